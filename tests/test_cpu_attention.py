"""The compiled attention, against the formula in float64."""

import importlib.machinery
import importlib.util
import shutil
import sysconfig

import pytest
import torch

from rsft_pipeline.decoding import cpu_attention

PLACES, LONGEST, COLUMNS = 3, 48, 21
LENGTHS = [48, 1, 30]
OWNERS = [2, 0, 0, 2, 1, 0, 0, 0, 2, 0]  # of ten rows


def test_it_was_compiled_where_there_is_a_compiler():
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no {compiler}")
    assert cpu_attention._library() is not None
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    assert cpu_attention.usable(torch.device("cpu"), torch.float32) == wide
    assert not cpu_attention.usable(torch.device("cpu"), torch.bfloat16)
    assert not cpu_attention.usable(torch.device("cuda"), torch.float32)


def test_what_cannot_be_loaded_is_named_and_done_without(tmp_path, monkeypatch, caplog):
    file = tmp_path / "_cpu_attention.so"
    file.write_text("made for another machine")
    found = importlib.machinery.ModuleSpec("rsft_pipeline.decoding._cpu_attention", None, origin=str(file))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    assert cpu_attention._library.__wrapped__() is None
    assert str(file) in caplog.text and "install the project again" in caplog.text


@pytest.mark.parametrize("key_size, value_size", [(8, 8), (16, 16), (32, 32), (40, 24), (64, 128)])
@pytest.mark.parametrize("heads, group", [(2, 1), (1, 3), (2, 8)])
@pytest.mark.parametrize("window", [None, 1, 5, 20, 40])
def test_it_is_softmax_over_what_each_row_sees(key_size, value_size, heads, group, window):
    torch.manual_seed(0)
    rows, scaling = len(OWNERS), 0.3
    query = torch.randn(rows, heads * group, 1, key_size)
    key, value = torch.randn(rows, heads, 1, key_size), torch.randn(rows, heads, 1, value_size)
    prefixes = torch.randn(PLACES, heads, key_size, LONGEST), torch.randn(PLACES, heads, LONGEST, value_size)
    suffixes = torch.randn(rows, heads, COLUMNS, key_size), torch.randn(rows, heads, COLUMNS, value_size)
    age = torch.tensor([0, 20, 3, 19, 1, 7, 16, 15, 0, 4])
    for i, length in enumerate(LENGTHS):  # what must not be read
        prefixes[0][i, ..., : LONGEST - length] = torch.nan
        prefixes[1][i, :, : LONGEST - length] = torch.nan
    for i, tokens in enumerate(age):
        suffixes[0][i, :, tokens:], suffixes[1][i, :, tokens:] = torch.nan, torch.nan

    out = cpu_attention.attend(
        *(query, key, value, prefixes, suffixes, cpu_attention.Rows(OWNERS, PLACES)),
        *(torch.tensor(LENGTHS), age, window, scaling),
    )

    assert out.shape == (rows, 1, heads * group, value_size)
    for i, place in enumerate(OWNERS):
        own = slice(0, int(age[i]) + 1)
        assert torch.equal(suffixes[0][i, :, age[i]], key[i, :, 0])  # it stored the newest
        assert torch.equal(suffixes[1][i, :, age[i]], value[i, :, 0])
        shared = slice(LONGEST - LENGTHS[place], None)
        keys = torch.cat([prefixes[0][place, ..., shared].transpose(-1, -2), suffixes[0][i, :, own]], dim=1)
        values = torch.cat([prefixes[1][place, :, shared], suffixes[1][i, :, own]], dim=1)
        seen = slice(-window if window else None, None)
        queries = query[i, :, 0].view(heads, group, key_size).double()
        weights = (scaling * queries @ keys[:, seen].double().transpose(-1, -2)).softmax(-1)
        expected = (weights @ values[:, seen].double()).view(heads * group, value_size)
        torch.testing.assert_close(out[i, 0].double(), expected, rtol=1e-5, atol=1e-5)


def test_a_score_far_below_the_largest_weighs_nothing():
    keys = torch.zeros(1, 1, 16, 16)
    keys[0, 0, 0] = torch.linspace(-1000, 1000, 16)  # scores of the prompt's tokens
    values = torch.arange(16.0).view(1, 1, 16, 1).expand(1, 1, 16, 16).contiguous()
    query = torch.zeros(1, 1, 1, 16)
    query[..., 0] = 1.0
    out = cpu_attention.attend(
        *(query, torch.zeros(1, 1, 1, 16), torch.zeros(1, 1, 1, 16)),
        *((keys, values), (torch.zeros(1, 1, 1, 16), torch.zeros(1, 1, 1, 16)), cpu_attention.Rows([0], 1)),
        *(torch.tensor([16]), torch.tensor([0]), None, 1.0),
    )
    torch.testing.assert_close(out.flatten(), torch.full((16,), 15.0))


def test_another_precision_than_the_weights_is_refused():
    half = torch.zeros(1, 1, 1, 16, dtype=torch.bfloat16)
    nothing = (half, half)
    with pytest.raises(TypeError, match="bfloat16 queries"):
        cpu_attention.attend(
            half, half, half, nothing, nothing, cpu_attention.Rows([0], 1), torch.ones(1), torch.ones(1), None, 1.0
        )
