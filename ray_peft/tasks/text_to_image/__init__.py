"""The task `text_to_image`: adapters for latent diffusion models."""
