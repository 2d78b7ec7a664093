"""What `plan` finds out about a pipeline: parts, weights, noise levels, sampler and prompts; no weight is loaded."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import tiny_diffusion
import torch
from safetensors.torch import load_file, save_file

from ray_peft.errors import ModelError
from ray_peft.spec import ModelSpec, TrialSpec
from ray_peft.tasks.text_to_image.fits import prompt_notes
from ray_peft.tasks.text_to_image.model import load_configs, load_noise, load_text_encoder, load_tokenizer, load_vae
from ray_peft.tasks.text_to_image.task import TextToImage

UNET, VAE = (f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae"))
TEXT = "text_encoder/model.safetensors"
SCHEDULER = "scheduler/scheduler_config.json"


@pytest.fixture
def copy(tiny_painter, tmp_path):
    """The pipeline, to be changed."""
    return shutil.copytree(tiny_painter, tmp_path / "model")


def inspect(model, images, **changes):
    return TextToImage().inspect(TrialSpec.from_plain(tiny_diffusion.plain_spec(model, images, **changes)))


def refusal(model, images, **changes):
    with pytest.raises(ModelError) as caught:
        inspect(model, images, **changes)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def edit(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def rename_weights(folder, file, change):
    weights = load_file(folder / file)
    save_file(change(weights), folder / file, metadata={"format": "pt"})


class TestKinds:
    def test_sdxl(self, copy, paintings):
        edit(copy / "model_index.json", text_encoder_2=["transformers", "CLIPTextModelWithProjection"])
        assert "has a second text encoder, as SDXL has" in refusal(copy, paintings)
        edit(copy / "model_index.json", text_encoder_2=[None, None])
        assert inspect(copy, paintings).train_rows == 6

    def test_a_unet_with_further_conditions(self, copy, paintings):
        edit(copy / "unet" / "config.json", addition_embed_type="text_time")
        text = "its UNet takes more inputs than timestep and caption (addition_embed_type: text_time)"
        assert text in refusal(copy, paintings)

    @pytest.mark.parametrize("kind", ["transformer", "prior"])
    def test_other_pipelines(self, copy, paintings, kind):
        edit(copy / "model_index.json", unet=None, **{kind: ["diffusers", "FluxTransformer2DModel"]})
        assert "has nothing as its unet" in refusal(copy, paintings)

    @pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "scheduler"])
    def test_a_part_that_is_missing(self, copy, paintings, part):
        shutil.rmtree(copy / part)
        assert f"has no {part}/" in refusal(copy, paintings)

    def test_a_text_encoder_of_another_width(self, copy, paintings):
        edit(copy / "unet" / "config.json", cross_attention_dim=48)
        expected = "its UNet takes captions of 48 numbers a token, and its text encoder makes 32"
        assert expected in refusal(copy, paintings)

    def test_a_unet_that_makes_something_else(self, copy, paintings):
        edit(copy / "unet" / "config.json", out_channels=8)
        assert "its UNet makes (8, 8, 8) of latents of (4, 8, 8)" in refusal(copy, paintings)

    def test_latents_scaled_by_channel(self, copy, paintings):
        edit(copy / "vae" / "config.json", latents_mean=[0.0] * 4)
        assert "scales each channel of the latents by itself (latents_mean)" in refusal(copy, paintings)

    @pytest.mark.parametrize("resolution", [8, 16, 24, 72])
    def test_small_and_odd_resolutions_pass_and_train(self, tiny_painter, paintings, resolution):
        changes = {"data__resolution": resolution, "data__min_side": 64, "evaluation__inference_steps": 1}
        plain = tiny_diffusion.plain_spec(tiny_painter, paintings, **changes)
        spec = TrialSpec.from_plain(plain)
        assert TextToImage().inspect(spec).train_rows == 6
        bench = TextToImage().load(spec, "cpu")
        (image,) = bench.illustrate(bench.evaluate()).images
        assert image.after.size == (resolution, resolution)


class TestFolders:
    def test_a_single_file(self, copy, paintings):
        found = refusal(copy / UNET, paintings)
        assert "is a file, not the folder of a pipeline; convert it with diffusers' StableDiffusionPipeline" in found

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("v1-5.safetensors", "is a checkpoint in one file: convert it"),
            ("adapter_config.json", "it holds an adapter"),
        ],
    )
    def test_a_folder_of_something_else(self, paintings, tmp_path, name, words):
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / name).write_text("{}")
        found = refusal(tmp_path / "other", paintings)
        assert "has no model_index.json" in found
        assert words in found

    def test_an_empty_tokenizer_folder_is_no_tokenizer(self, copy, paintings):
        for file in (copy / "tokenizer").iterdir():
            file.unlink()
        assert "has no tokenizer (vocab.json and merges.txt, or tokenizer.json)" in refusal(copy, paintings)

    def test_a_tokenizer_that_does_not_say_its_length_cuts_where_the_text_encoder_does(self, copy, paintings):
        (copy / "tokenizer" / "tokenizer_config.json").unlink()
        assert load_tokenizer(ModelSpec(name=str(copy))).model_max_length == 77
        assert inspect(copy, paintings).train_rows == 6

    def test_a_tokenizer_of_a_larger_vocabulary(self, copy, paintings):
        edit(copy / "text_encoder" / "config.json", vocab_size=500)
        found = refusal(copy, paintings)
        assert "the tokenizer's largest id is 520, but the text encoder of" in found
        assert "knows 500 tokens" in found


class TestWeights:
    @pytest.mark.parametrize("file", [UNET, VAE, TEXT])
    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (lambda whole: whole[: len(whole) // 2], "is cut: it has "),
            (lambda whole: whole[:100], "is cut or damaged: its header is not whole"),
            (lambda whole: b"", "is an empty file; download it again"),
            (lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a pointer of Git LFS"),
            (lambda whole: b"<!doctype html><html>404", "is a web page"),
        ],
        ids=["half", "header", "empty", "pointer", "page"],
    )
    def test_files_that_are_not_whole(self, copy, paintings, file, content, words):
        (copy / file).write_bytes(content((copy / file).read_bytes()))
        found = refusal(copy, paintings)
        assert found.startswith(f"model.name: {copy / file}: ")
        assert words in found

    @pytest.mark.parametrize("file", [UNET, VAE, TEXT])
    def test_a_weight_that_is_missing_left_over_or_of_another_shape(self, copy, paintings, file):
        whole = (copy / file).read_bytes()
        last = sorted(load_file(copy / file))[-1]
        rename_weights(copy, file, lambda weights: {name: weights[name] for name in weights if name != last})
        assert f"{last} of {len(load_file(copy / file)) + 1} are missing in the files" in refusal(copy, paintings)
        (copy / file).write_bytes(whole)
        rename_weights(copy, file, lambda weights: weights | {"layer_of_nobody.weight": torch.zeros(2)})
        assert "the files hold layer_of_nobody.weight, which the config has no layer for" in refusal(copy, paintings)
        (copy / file).write_bytes(whole)
        rename_weights(copy, file, lambda weights: weights | {last: torch.zeros(3)})
        assert f"{last} is (3,) in the files, and (" in refusal(copy, paintings)

    def test_a_config_of_more_layers_than_the_weights(self, copy, paintings):
        edit(copy / "text_encoder" / "config.json", num_hidden_layers=3)
        assert "encoder.layers.2.layer_norm1.bias" in refusal(copy, paintings)

    def test_names_of_earlier_versions_are_read(self, copy, paintings):
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

        def earlier(weights):
            for now, then in old.items():
                weights = {
                    name.replace(f"attentions.0.{now}.", f"attentions.0.{then}."): weights[name] for name in weights
                }
            return weights

        before = load_vae(ModelSpec(name=str(copy)), "cpu", "float32").state_dict()
        rename_weights(copy, VAE, earlier)
        rename_weights(copy, TEXT, lambda weights: {f"text_model.{name}": weights[name] for name in weights})
        rename_weights(
            copy, TEXT, lambda weights: weights | {"text_model.embeddings.position_ids": torch.arange(77)[None]}
        )
        assert any(".query." in name for name in load_file(copy / VAE))
        assert inspect(copy, paintings).train_rows == 6
        after = load_vae(ModelSpec(name=str(copy)), "cpu", "float32").state_dict()
        assert all(torch.equal(after[name], before[name]) for name in before)
        load_text_encoder(ModelSpec(name=str(copy)), "cpu", "float32")

    def test_a_variant_is_read_where_there_are_no_other_files(self, copy, paintings):
        for file in (UNET, VAE, TEXT):
            (copy / file).rename(copy / file.replace(".safetensors", ".fp16.safetensors"))
        spec = TrialSpec.from_plain(tiny_diffusion.plain_spec(copy, paintings))
        assert TextToImage().inspect(spec).train_rows == 6
        assert TextToImage().load(spec, "cpu").eval_loss() > 0

    def test_two_variants_are_refused(self, copy, paintings):
        (copy / UNET).rename(copy / UNET.replace(".safetensors", ".fp16.safetensors"))
        shutil.copy(
            copy / UNET.replace(".safetensors", ".fp16.safetensors"), copy / UNET.replace(".saf", ".non_ema.saf")
        )
        assert "in the variants fp16, non_ema and none without a variant; rename" in refusal(copy, paintings)

    def test_pickles_alone_are_refused(self, copy, paintings):
        (copy / UNET).rename(copy / UNET.replace(".safetensors", ".bin"))
        assert "but diffusion_pytorch_model.bin, whose kind may run code and is not read" in refusal(copy, paintings)

    def test_shards(self, copy, paintings):
        weights = load_file(copy / UNET)
        names = sorted(weights)
        shards = {
            "diffusion_pytorch_model-1.safetensors": names[:100],
            "diffusion_pytorch_model-2.safetensors": names[100:],
        }
        for file, inside in shards.items():
            save_file({name: weights[name] for name in inside}, copy / "unet" / file, metadata={"format": "pt"})
        (copy / UNET).unlink()
        index = {"metadata": {}, "weight_map": {name: file for file, inside in shards.items() for name in inside}}
        (copy / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
        assert inspect(copy, paintings).train_rows == 6
        (copy / "unet" / "diffusion_pytorch_model-2.safetensors").unlink()
        assert "1 of 2 files that diffusion_pytorch_model.safetensors.index.json names are missing" in refusal(
            copy, paintings
        )


class TestNoiseLevels:
    def test_noise_alone_at_the_end_cannot_be_learnt_as_noise(self, copy, paintings):
        """Of a sampler that knows the setting."""
        edit(copy / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
        edit(copy / SCHEDULER, rescale_betas_zero_snr=True, timestep_spacing="trailing", _class_name="DDIMScheduler")
        for changes in ({}, {"evaluation__prompts": []}, {"train__prediction": "epsilon"}):
            found = refusal(copy, paintings, **changes)
            assert "its scheduler ends with noise alone" in found
            assert "method.lr" not in found
        edit(copy / SCHEDULER, prediction_type="v_prediction")
        assert inspect(copy, paintings).train_rows == 6

    def test_trained_betas_that_end_with_noise_alone(self, copy, paintings):
        betas = [*np.linspace(0.001, 0.012, 999), 1.0]
        edit(copy / SCHEDULER, trained_betas=betas)
        assert "its scheduler ends with noise alone" in refusal(copy, paintings)
        edit(copy / SCHEDULER, trained_betas=betas[:500])
        assert "has 500 trained_betas for num_train_timesteps: 1000" in refusal(copy, paintings)
        edit(copy / SCHEDULER, trained_betas=[2.0] * 1000)
        assert "betas are no noise levels" in refusal(copy, paintings)

    def test_a_sampler_that_divides_by_the_signal_is_refused_where_there_is_none(self, copy, paintings):
        """PNDM has no setting for it, and divides by the signal whatever is predicted."""
        edit(
            copy / SCHEDULER,
            trained_betas=[*np.linspace(0.001, 0.012, 999), 1.0],
            prediction_type="v_prediction",
            steps_offset=0,
        )
        found = refusal(copy, paintings, evaluation__inference_steps=1000)
        assert "its scheduler PNDMScheduler makes NaN or infinity at timestep" in found
        assert inspect(copy, paintings, evaluation__prompts=[]).train_rows == 6

    @pytest.mark.parametrize("kind", ["FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler"])
    def test_another_kind_of_diffusion(self, copy, paintings, kind):
        edit(copy / "model_index.json", scheduler=["diffusers", kind])
        assert f"its scheduler {kind} is of another kind of diffusion" in refusal(copy, paintings)

    def test_a_number_of_steps_that_the_sampler_cannot_do(self, tiny_painter, paintings):
        """Of Stable Diffusion's own: its steps_offset of 1 leads beyond the last of its timesteps."""
        found = refusal(tiny_painter, paintings, evaluation__inference_steps=1000)
        assert "its scheduler PNDMScheduler cannot make images in evaluation.inference_steps: 1000: index 1000" in found

    def test_a_scheduler_that_nobody_knows(self, copy, paintings):
        edit(copy / "model_index.json", scheduler=["diffusers", "MyScheduler"])
        assert "names the scheduler MyScheduler, which diffusers lacks" in refusal(copy, paintings)

    @pytest.mark.parametrize("key", ["timesteps", "inference_steps"])
    def test_more_timesteps_than_there_are(self, tiny_painter, paintings, key):
        assert inspect(tiny_painter, paintings, **{f"evaluation__{key}": 999}).train_rows == 6
        found = refusal(tiny_painter, paintings, **{f"evaluation__{key}": 1001})
        assert found.startswith(f"evaluation.{key}: 1001: the scheduler of ")
        assert found.endswith("has 1000 timesteps; use at most 1000")

    @pytest.mark.parametrize(
        "kind", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"]
    )
    def test_the_usual_samplers_pass(self, copy, paintings, kind):
        edit(copy / "model_index.json", scheduler=["diffusers", kind])
        assert inspect(copy, paintings, evaluation__inference_steps=25).train_rows == 6

    def test_another_prediction_than_the_models_own_is_said(self, tiny_painter, paintings):
        (note,) = (
            each
            for each in inspect(tiny_painter, paintings, train__prediction="v_prediction").notes
            if "v_pred" in each
        )
        assert note.startswith("train.prediction: v_prediction is not what ")
        assert not any(
            "prediction" in each for each in inspect(tiny_painter, paintings, train__prediction="epsilon").notes
        )


class TestPrompts:
    def test_prompts_that_are_cut_and_prompts_that_are_equal_afterwards(self, tiny_painter, paintings):
        long = "swirl " * 80
        prompts = ["a red swirl", long + "in red", "A  RED swirl", long + "in blue", "a blue swirl"]
        notes = inspect(tiny_painter, paintings, evaluation__prompts=prompts).notes
        assert [each for each in notes if each.startswith("evaluation.prompts")] == [
            "evaluation.prompts: 2 of 5 are cut to 77 tokens (number 2, 4)",
            "evaluation.prompts: numbers 1 and 3 are equal for the model, and so are their images",
            "evaluation.prompts: numbers 2 and 4 are equal for the model, and so are their images",
        ]

    def test_they_are_equal_as_the_pipeline_sees_them(self, tiny_painter):
        tokenizer = load_tokenizer(ModelSpec(name=str(tiny_painter)))
        for prompts in (["swirl " * 75, "swirl " * 76], ["swirl " * 74, "swirl " * 75], ["a", "b"]):
            given = tokenizer(prompts, padding="max_length", max_length=77, truncation=True).input_ids
            assert (given[0] == given[1]) == bool([each for each in prompt_notes(prompts, tokenizer) if "same" in each])

    def test_signs_of_the_tokenizer_in_prompts_and_captions_are_counted(self, tiny_painter, paintings, tmp_path):
        shutil.copytree(paintings, tmp_path / "images")
        lines = (paintings / "metadata.jsonl").read_text().replace("number 3", "<|endoftext|> 3")
        (tmp_path / "images" / "metadata.jsonl").write_text(lines)
        notes = inspect(tiny_painter, tmp_path / "images", evaluation__prompts=["a <|startoftext|>", "b"]).notes
        assert [each for each in notes if "own sign" in each] == [
            "1 of 8 captions hold <|endoftext|>, which the tokenizer reads as a special token and not as text",
            "1 of 2 prompts hold <|startoftext|>, which the tokenizer reads as a special token and not as text",
        ]

    def test_held_out_captions_that_are_cut_are_said_as_well(self, tiny_painter, paintings, tmp_path):
        shutil.copytree(paintings, tmp_path / "images")
        rows = [json.loads(line) for line in (paintings / "metadata.jsonl").read_text().splitlines()]
        text = "\n".join(json.dumps(row | {"text": row["text"] + " swirl" * 90}) for row in rows)
        (tmp_path / "images" / "metadata.jsonl").write_text(text)
        notes = inspect(tiny_painter, tmp_path / "images").notes
        assert sum(" captions are cut to 77 tokens, such as that of " in each for each in notes) == 2


class TestShift:
    @pytest.mark.parametrize("convolutions", [True, False])
    def test_a_shift_is_folded_into_the_weights(self, copy, convolutions):
        from diffusers import AutoencoderKL

        torch.manual_seed(0)
        config = json.loads((copy / "vae" / "config.json").read_text())
        config |= {"shift_factor": 0.6, "use_quant_conv": convolutions, "use_post_quant_conv": convolutions}
        AutoencoderKL.from_config(config).save_pretrained(copy / "vae")
        plain = AutoencoderKL.from_pretrained(copy / "vae").eval()
        folded = load_vae(ModelSpec(name=str(copy)), "cpu", "float32")
        assert folded.config.shift_factor is None
        pixels, latents = torch.rand(1, 3, 64, 64) * 2 - 1, torch.randn(1, 4, 8, 8)
        with torch.no_grad():
            before, after = (vae.encode(pixels).latent_dist for vae in (plain, folded))
            assert torch.allclose(after.mean, before.mean - 0.6, atol=1e-5)
            assert torch.allclose(after.logvar, before.logvar, atol=1e-5)
            expected = plain.decode(latents + 0.6).sample
            assert torch.allclose(folded.decode(latents).sample, expected, atol=1e-5)
        folded.save_pretrained(copy / "exported")
        again = AutoencoderKL.from_pretrained(copy / "exported").eval()
        with torch.no_grad():
            assert torch.allclose(again.decode(latents).sample, expected, atol=1e-5)

    def test_trials_train_on_shifted_latents_and_undo_the_shift_in_images(self, tiny_painter, copy, paintings):
        edit(copy / "vae" / "config.json", shift_factor=0.6)
        plain, shifted = (
            TextToImage().load(TrialSpec.from_plain(tiny_diffusion.plain_spec(model, paintings)), "cpu")
            for model in (tiny_painter, copy)
        )
        for split in ("train", "test"):
            means, others = (getattr(each.encoded, split).moments.chunk(2, dim=2)[0] for each in (plain, shifted))
            assert torch.allclose(others, means - 0.6, atol=1e-5)
        assert shifted.model_fingerprint != plain.model_fingerprint
        (before,), (after,) = (each.illustrate(each.evaluate()).images for each in (plain, shifted))
        assert not np.array_equal(np.asarray(before.after), np.asarray(after.after))


def test_a_schedule_is_of_the_pipelines_betas(tiny_painter, paintings):
    spec = TrialSpec.from_plain(tiny_diffusion.plain_spec(tiny_painter, paintings))
    assert float(load_noise(spec).alphas_cumprod[-1]) == pytest.approx(0.00466, rel=1e-2)
    assert load_configs(spec.model).parts["scheduler"]["num_train_timesteps"] == 1000
