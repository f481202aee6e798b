"""What `weft show` prints of a value: for people, while --json keeps all as it stands."""

from weft.cli.show_words import value_words


def test_people_read_numbers_as_numbers_and_nothing_that_is_empty():
    said = {
        "seed": "0",
        "loss": "0.2023351234",
        "times": "[0.0, 1.0]",
        "version": "1.10",
        "vae": None,
        "files": {"a": None},
    }
    assert value_words(said).split("\n" + " " * 17) == [
        "seed: 0", "loss: 0.202335", "times: [0.0, 1.0]", "version: '1.10'",
    ]  # fmt: skip
