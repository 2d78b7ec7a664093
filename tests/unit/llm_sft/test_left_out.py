"""Unusable rows are counted by reason, and as many reasons as rows do not flood a note."""

from ray_peft.tasks.llm_sft.left_out import MOST_REASONS, NAMED, OTHERS, LeftOut


def filled(reasons: int, file: str = "") -> LeftOut:
    found = LeftOut()
    for number in range(1, reasons + 1):
        found.add(f"role is 'r{number}'", file, number)
    return found


def test_each_reason_has_its_first_rows():
    found = filled(2)
    for number in range(10, 20):
        found.add("role is 'r1'", "", number)
    assert found.named() == {"role is 'r1'": "rows 1, 10, 11, 12, 13 and 6 more", "role is 'r2'": "row 2"}
    assert found.summary() == "11 x role is 'r1': rows 1, 10, 11, 12, 13 and 6 more, 1 x role is 'r2': row 2"


def test_more_reasons_than_can_be_read_are_counted_together():
    found, other = filled(1000), filled(30, "b.jsonl")
    found.update(other)
    assert found.counts.total() == 1030
    assert len(found.counts) == MOST_REASONS + 1
    assert found.counts["role is 'r1'"] == 2
    assert found.counts[OTHERS] == 1030 - 2 * MOST_REASONS
    assert len(found.first[OTHERS]) == NAMED
    assert len(found.clause()) < 2000
