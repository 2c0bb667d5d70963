"""What a model answered, as lm-eval's samples tell it."""

import json
import math
from pathlib import Path

import pytest
from saved_runs import sample, write_samples

from lm_eval_coupling.saved.samples import read_answers


class TestAnswers:
    def read(self, tmp_path, *samples, main="acc,none"):
        return read_answers(write_samples(tmp_path, "t", samples), main)

    def test_multiple_choice(self, tmp_path):
        actual = self.read(
            tmp_path,
            sample("a"),
            sample("b", acc=1.0, target="red"),
            sample("c", acc=0.5, target=None),
        )
        assert actual["a"] == {
            "scores": {"acc,none": 0.0},
            "given": "red",
            "expected": "blue",
            "bytes": [4, 5],
            "options": [("red", -1.5), ("blue", -2.5)],
            "right": False,
        }
        assert actual["b"]["right"] is True and actual["b"]["expected"] == "red"
        assert actual["c"]["right"] is None and actual["c"]["expected"] is None

    def test_choices_that_differ_in_their_context(self, tmp_path):
        names = ("Sarah", "Samantha")
        arguments = {
            f"gen_args_{i}": {"arg_0": f"It was {name}", "arg_1": " who won."}
            for i, name in enumerate(names)
        }
        actual = self.read(tmp_path, sample("a", arguments=arguments, target="who won."))
        assert (
            actual["a"]["options"] == [("Sarah", -1.5), ("Samantha", -2.5)]
            and actual["a"]["expected"] == "who won."
        )

    def test_unconditional_likelihoods_are_no_choices(self, tmp_path):
        arguments = [("Why?", " red"), ("Why?", " blue"), ("", " red"), ("", " blue")]
        arguments = {
            f"gen_args_{i}": {"arg_0": a, "arg_1": b} for i, (a, b) in enumerate(arguments)
        }
        responses = [[-3.0, False], [-2.0, False], [-1.0, False], [-0.5, False]]
        actual = self.read(tmp_path, sample("a", arguments=arguments, filtered_resps=responses))
        assert (
            actual["a"]["options"] == [("red", -3.0), ("blue", -2.0)]
            and actual["a"]["given"] == "blue"
        )

    def test_generation_with_two_filters(self, tmp_path):
        generated = {
            "arguments": {"gen_args_0": {"arg_0": "6*7?", "arg_1": {"until": ["\n"]}}},
            "resps": [["It is 42, or #### 41"]],
            "target": "42",
            "metrics": ["exact_match"],
        }
        strict = sample(
            "a", **generated, filter="strict-match", filtered_resps=["41"], exact_match=0.0
        )
        flexible = sample(
            "a", **generated, filter="flexible-extract", filtered_resps=["42"], exact_match=1.0
        )
        for order in ((strict, flexible), (flexible, strict)):
            actual = self.read(tmp_path, *order, main="exact_match,flexible-extract")["a"]
            assert (
                actual["given"] == "42"
                and actual["generated"] == "It is 42, or #### 41"
                and actual["expected"] == "42"
            )
            assert actual["right"] is True
            assert actual["scores"] == {
                "exact_match,strict-match": 0.0,
                "exact_match,flexible-extract": 1.0,
            }
            assert (
                self.read(tmp_path, *order, main="exact_match,strict-match")["a"]["given"] == "41"
            )

    def test_one_scored_continuation_is_no_choice(self, tmp_path):
        arguments = {"gen_args_0": {"arg_0": "The sky is", "arg_1": " blue"}}
        actual = self.read(
            tmp_path,
            sample("a", arguments=arguments, filtered_resps=[["-1.0", "True"]], target=" blue"),
        )
        assert (
            actual["a"]["given"] is None
            and actual["a"]["expected"] == "blue"
            and actual["a"]["options"] == [("blue", -1.0)]
        )

    def test_rolling_likelihoods_have_no_answer(self, tmp_path):
        rolling = {
            "arguments": {"gen_args_0": {"arg_0": "text"}},
            "filtered_resps": [-123.4],
            "resps": [[-123.4]],
        }
        actual = self.read(tmp_path, sample("a", **rolling, target="text"))
        assert actual["a"]["options"] == [] and actual["a"]["right"] is False

    def test_no_file_an_unfinished_line_and_strange_lines(self, tmp_path):
        assert read_answers(tmp_path / "none.jsonl", "acc,none") == {}
        file = write_samples(tmp_path, "t", [sample("a"), [], {}])
        file.write_text(file.read_text() + '{"doc_hash": "b", "tar')
        assert set(read_answers(file, None)) == {"a"}

    def test_lines_without_a_hash_are_no_one_document(self, tmp_path):
        """All documents of an old lm-eval were one, whose loss was that of the last line."""
        lines = [sample(None) for _ in range(3)]
        del lines[0]["doc_hash"]
        problems = []
        file = write_samples(tmp_path, "t", lines)
        assert read_answers(file, "acc,none", evaluated=3, problems=problems) == {}
        assert "with 3 lines that are not as lm-eval writes them" in problems[0]

    def test_lines_of_another_encoding_are_left_out_and_counted(self, tmp_path):
        """An é of one byte was replaced by a character of three, by which the loss was divided."""
        file, problems = tmp_path / "samples_t_x.jsonl", []
        lines = [json.dumps(sample(name, target="é"), ensure_ascii=False) for name in "ab"]
        file.write_bytes(lines[0].encode("latin-1") + b"\n" + lines[1].encode() + b"\n")
        assert set(read_answers(file, "acc,none", evaluated=2, problems=problems)) == {"b"}
        assert "the answers to 1 documents, expected those to the 2" in problems[0]

    @pytest.mark.parametrize("impossible", ["0.41", 0.41, "nan", math.nan, "inf", 1e300])
    def test_likelihoods_that_no_probability_has_are_left_out_and_named(self, tmp_path, impossible):
        """A loss of -0.08 nats per byte went into the mean."""
        wrong = sample("b", filtered_resps=[["-1.5", "False"], [impossible, "False"]], acc=1.0)
        file, problems = write_samples(tmp_path, "t", [sample("a"), wrong, wrong]), []
        answers = read_answers(file, "acc,none", evaluated=3, problems=problems)
        assert set(answers) == {"a"}
        words = f"got {file} with a log-likelihood of {float(impossible)} of document 'b'"
        assert problems == [
            f"{words}, expected at most 0; 2 such lines are left out: run the evaluation again"
        ]

    @pytest.mark.parametrize("given", ["0.0", 1e-6, "-inf", None, "A", [], True])
    def test_rounding_certainty_and_other_responses_are_no_error(self, tmp_path, given):
        line = sample("a", filtered_resps=[[given, "False"], ["-2.0", "False"]])
        problems = []
        answers = read_answers(write_samples(tmp_path, "t", [line]), "acc,none", problems=problems)
        assert not problems and answers["a"]["right"] is False
        assert len(answers["a"]["options"]) == (2 if given in ("0.0", 1e-6) else 0)

    def test_a_file_that_cannot_be_read_is_named(self, tmp_path, monkeypatch):
        file, problems = write_samples(tmp_path, "t", [sample("a")]), []

        def refuse(*_, **__):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "open", refuse)
        assert read_answers(file, "acc,none", problems=problems) == {}
        assert problems == [f"got {file}, which cannot be read (it is not permitted)"]
