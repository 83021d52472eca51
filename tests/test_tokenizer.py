import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from utils.tokenizer import clean, get_tokenizer


@pytest.fixture(scope="module")
def peer():
    return pytest.importorskip("open_clip.tokenizer").SimpleTokenizer()


@pytest.mark.slow
def test_all_captions_of_val2017_get_open_clips_ids(data_dir, peer):
    file = data_dir / "coco_mini" / "annotations" / "captions_val2017_all5000.json"
    captions = [annotation["caption"] for annotation in json.loads(file.read_text())["annotations"]]
    assert len(captions) == 25_014
    assert [caption for caption in captions if get_tokenizer().encode(caption) != peer.encode(caption)] == []


@given(st.text())
@example("it's they're I'LL \u017f '\u017f")  # the long s equals s if case is ignored
@example("a<start_of_text>!<end_of_text> <START_OF_TEXT>")
@example("&amp;lt;b&gt; &quot;caf\u00e9&quot; caf\u0065\u0301")
@example("\u0345 x\u0345")
@example("\u4e2d\u6587 \u0639\u0631\u0628\u064a \U0001f600\u200d\U0001f9b0 \u2167 x\u00b2")
@example("tab\tnewline\r\n\u00a0\u3000 end")
@pytest.mark.slow
@settings(max_examples=500, deadline=None)
def test_any_text_gets_open_clips_ids(peer, text):
    assert get_tokenizer().encode(text) == peer.encode(text)


@given(st.text(alphabet=st.characters(max_codepoint=127)))
@settings(max_examples=300, deadline=None)
def test_plain_text_needs_no_repair(text):
    import html

    import ftfy

    assert clean(text) == " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()


def test_a_batch_is_as_long_as_its_longest_text_rounded_up_to_a_multiple():
    tokens = get_tokenizer()(["a cat", "a photo of a very small dog"])
    assert tokens.shape == (2, 16)
    assert tokens[0].tolist() == [49406, 320, 2368, 49407] + [0] * 12
    assert get_tokenizer()(["a cat"], multiple=1).shape == (1, 4)
    assert get_tokenizer()([]).shape == (0, 0)


def test_long_texts_are_truncated_and_keep_the_end_marker(peer):
    text = "dog " * 100
    tokens = get_tokenizer()([text])
    assert tokens.shape == (1, 77)
    assert tokens[0, -1] == 49407
    assert tokens.tolist() == peer([text]).tolist()


def test_lone_surrogates_do_not_crash():
    assert get_tokenizer()(["broken \ud800 text"])[0, 0] == 49406
