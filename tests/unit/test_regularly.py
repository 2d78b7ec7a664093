"""Work beside the work: it goes on after an error of the file system, and has ended when the block has."""

import threading

from ray_peft.foundation.regularly import regularly


def test_it_goes_on_after_an_error_of_the_file_system_and_ends_with_the_block():
    calls, third = [], threading.Event()

    def act():
        calls.append(None)
        if len(calls) >= 3:
            third.set()
        raise OSError("stale file handle")

    with regularly(act, 0.01, "looks"):
        assert third.wait(5)
        assert "looks" in {thread.name for thread in threading.enumerate()}
    assert "looks" not in {thread.name for thread in threading.enumerate()}
