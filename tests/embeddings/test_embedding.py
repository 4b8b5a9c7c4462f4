from __future__ import annotations

import json
import multiprocessing
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cit_fast.data import Example, Task
from cit_fast.embeddings.build import build_embedder
from cit_fast.embeddings.cache import CachedEmbedder
from cit_fast.embeddings.measure import instruction_measure, task_clouds
from cit_fast.embeddings.sentence import SentenceEmbedder
from cit_fast.embeddings.token_mean import TokenMeanEmbedder
from cit_fast.errors import ConfigError, DataError, RunError

TEXTS = ["Write the date.", "Answer with one word.", "x", "Convert the number to words and answer. " * 40, "Ünïcödé ✓"]


@pytest.fixture
def weight(tiny_tokenizer):
    return torch.randn(len(tiny_tokenizer), 24, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model(tiny_model_folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_folder)


def example(instruction, **fields):
    return Example(instruction, references=("answer",), **fields)


def task(name, *instructions):
    return Task(name, tuple(example(each) for each in instructions))


class Counting:
    """Embeds a text by its length and remembers what it was asked."""

    name = "counting"

    def __init__(self):
        self.asked = []

    def embed(self, texts):
        self.asked += texts
        return torch.tensor([[len(text), 1.0] for text in texts])


# -- mean token embeddings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mean_of_token_embeddings(weight, tiny_tokenizer, dtype):
    weight = weight.to(dtype)
    points = TokenMeanEmbedder(weight, tiny_tokenizer).embed(TEXTS)
    assert points.dtype == torch.float32
    for text, point in zip(TEXTS, points, strict=True):
        ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
        torch.testing.assert_close(point.double(), weight[ids].double().mean(0), rtol=1e-5, atol=1e-5)


def test_a_text_has_the_same_bits_in_any_batch(weight, tiny_tokenizer):
    embedder = TokenMeanEmbedder(weight, tiny_tokenizer)
    texts = [f"{text} {number}" for number in range(150) for text in TEXTS]  # more than one batch
    together = embedder.embed(texts)
    assert torch.equal(together, torch.cat([embedder.embed([text]) for text in texts]))
    assert torch.equal(together, embedder.embed(texts[::-1]).flip(0))


def test_special_tokens_are_left_out(weight, tiny_tokenizer):
    class WithStart:
        def __call__(self, texts, **options):
            encoded = tiny_tokenizer(texts, **options)
            if options.get("add_special_tokens", True):
                encoded["input_ids"] = [[0, *ids] for ids in encoded["input_ids"]]
            return encoded

    expected = TokenMeanEmbedder(weight, tiny_tokenizer).embed(TEXTS)
    assert torch.equal(TokenMeanEmbedder(weight, WithStart()).embed(TEXTS), expected)


def test_no_texts(weight, tiny_tokenizer):
    assert TokenMeanEmbedder(weight, tiny_tokenizer).embed([]).shape == (0, 24)


def test_a_text_without_tokens_is_named(weight, tiny_tokenizer):
    with pytest.raises(DataError, match=r"text 301: '' has no tokens"):
        TokenMeanEmbedder(weight, tiny_tokenizer).embed([*["a"] * 301, "", "b"])


def test_a_tokenizer_of_another_model_is_named(weight, tiny_tokenizer):
    with pytest.raises(DataError, match=r"text 1: its tokens run to \d+, and the embeddings have 80 rows"):
        TokenMeanEmbedder(weight[:80], tiny_tokenizer).embed(["!", "Write the date."])


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.empty(0), "the weight is empty"),  # what DeepSpeed ZeRO-3 leaves in a module
        (torch.empty(5, 3, device="meta"), "the weight is a meta tensor"),
        (torch.ones(12), r"are \[12\] torch.float32; expected \[V, d\]"),
        (torch.ones(4, 3, dtype=torch.int8), "expected .V, d., floating point"),
    ],
)
def test_weights_that_cannot_serve(weight, tiny_tokenizer, message):
    with pytest.raises(ConfigError, match=message):
        TokenMeanEmbedder(weight, tiny_tokenizer)


def test_a_shard_is_refused(tiny_tokenizer, weight, tmp_path):
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        shard = distribute_tensor(weight, init_device_mesh("cpu", (1,)), [Shard(0)])
        with pytest.raises(ConfigError, match="a shard of it; gather it first"):
            TokenMeanEmbedder(shard, tiny_tokenizer)
    finally:
        distributed.destroy_process_group()


def test_the_name_follows_weights_and_tokenizer_and_nothing_else(weight, tiny_tokenizer):
    from copy import deepcopy

    name = TokenMeanEmbedder(weight, tiny_tokenizer).name
    used = deepcopy(tiny_tokenizer)
    used(["a", "b c d"], padding=True, truncation=True, max_length=2)
    assert TokenMeanEmbedder(weight.clone(), used).name == name
    changed = weight.clone()
    changed[-1, -1] += 1e-6
    assert TokenMeanEmbedder(changed, tiny_tokenizer).name != name
    assert TokenMeanEmbedder(weight.view(-1, 48), tiny_tokenizer).name != name
    used.add_tokens(["<new>"])
    assert TokenMeanEmbedder(weight, used).name != name


# -- where the weight comes from -----------------------------------------------------------------------------------


def test_folder_and_live_model_agree(tiny_model_folder, tiny_tokenizer, model):
    from_folder = TokenMeanEmbedder.from_pretrained(tiny_model_folder)
    live = TokenMeanEmbedder.of_model(model, tiny_tokenizer)
    assert torch.equal(live.embed(TEXTS), from_folder.embed(TEXTS))
    assert live.name == from_folder.name


def test_adapters_on_other_layers_change_nothing(tiny_tokenizer, model):
    from peft import LoraConfig, get_peft_model

    plain = TokenMeanEmbedder.of_model(model, tiny_tokenizer).embed(TEXTS)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert torch.equal(TokenMeanEmbedder.of_model(adapted, tiny_tokenizer).embed(TEXTS), plain)


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*", "ignore:.*tied.*")
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens"], "init_lora_weights": False},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [40, 41]}},
    ],
    ids=["lora", "saved", "new-tokens"],
)
def test_adapters_of_the_embeddings_count(tiny_tokenizer, model, options):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "embed_tokens" in name and parameter.requires_grad:
                parameter.normal_()
    points = TokenMeanEmbedder.of_model(adapted, tiny_tokenizer).embed(TEXTS)
    layer = adapted.get_input_embeddings()
    for text, point in zip(TEXTS, points, strict=True):
        ids = tiny_tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        torch.testing.assert_close(point, layer(ids)[0].mean(0), rtol=1e-4, atol=1e-5)


def test_a_model_without_token_embeddings(tiny_tokenizer):
    with pytest.raises(ConfigError, match="Linear has no input embeddings"):
        TokenMeanEmbedder.of_model(nn.Linear(2, 2), tiny_tokenizer)


def test_sharded_folder(tiny_model_folder, model, tiny_tokenizer, tmp_path):
    expected = TokenMeanEmbedder.from_pretrained(tiny_model_folder)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    tiny_tokenizer.save_pretrained(tmp_path)
    placed = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(placed.values())) > 1
    for file in set(placed.values()) - {placed["model.embed_tokens.weight"]}:
        (tmp_path / file).write_bytes(b"never opened")
    assert TokenMeanEmbedder.from_pretrained(tmp_path).name == expected.name


def test_a_file_under_another_prefix(tiny_model_folder, tmp_path):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    renamed = {f"language_model.{key}": value for key, value in tensors.items()}
    renamed["vision.embed_tokens.weight"] = torch.zeros(7, 32)  # of another shape
    save_file(renamed, folder / "model.safetensors")
    expected = TokenMeanEmbedder.from_pretrained(tiny_model_folder).name
    assert TokenMeanEmbedder.from_pretrained(folder).name == expected
    renamed["other.embed_tokens.weight"] = torch.zeros_like(tensors["model.embed_tokens.weight"])
    save_file(renamed, folder / "model.safetensors")
    with pytest.raises(ConfigError, match="several tensors that may be its input embeddings"):
        TokenMeanEmbedder.from_pretrained(folder)


def test_adapter_folder(tiny_model_folder, model, tmp_path):
    from peft import LoraConfig, get_peft_model

    model.name_or_path = str(tiny_model_folder)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    adapted.peft_config["default"].base_model_name_or_path = str(tiny_model_folder)
    adapted.save_pretrained(tmp_path / "other-layers")
    expected = TokenMeanEmbedder.from_pretrained(tiny_model_folder).name
    assert TokenMeanEmbedder.from_pretrained(tmp_path / "other-layers").name == expected
    file = tmp_path / "other-layers" / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(1)}, file)
    with pytest.raises(ConfigError, match="changes the input embeddings"):
        TokenMeanEmbedder.from_pretrained(tmp_path / "other-layers")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "is no model with input embeddings"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"torn"), "model.safetensors cannot be read"),
        (lambda folder: save_file({"a": torch.ones(1)}, folder / "model.safetensors"), "has no tensor embed_tokens"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "holds no tokenizer that can be read"),
        (lambda folder: [file.unlink() for file in folder.glob("tokenizer*")], "holds no tokenizer"),
    ],
)
def test_damaged_model_folder(tiny_model_folder, tmp_path, damage, message):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "copy")
    damage(folder)
    with pytest.raises(ConfigError, match=message):
        TokenMeanEmbedder.from_pretrained(folder)


# -- by a short text -----------------------------------------------------------------------------------------------


def test_build_embedder(tiny_model_folder, tiny_tokenizer, model, tmp_path):
    expected = TokenMeanEmbedder.from_pretrained(tiny_model_folder).name
    assert build_embedder("tokens", model=model, tokenizer=tiny_tokenizer).name == expected
    cached = build_embedder(str(tiny_model_folder), cache=tmp_path / "cache")
    assert isinstance(cached, CachedEmbedder)
    assert cached.name == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tokens", "needs a model and its tokenizer"),
        ("tokenz", r"embedder \(tokens, sentence or a model\): no folder 'tokenz'"),
        ("./nowhere", r"no folder '\./nowhere'"),
        ("nobody/nothing", "the hub does not give it"),
    ],
)
def test_unknown_embedder(spec, message):
    with pytest.raises(ConfigError, match=message):
        build_embedder(spec)


# -- measures ------------------------------------------------------------------------------------------------------


def test_measure_counts_examples():
    instructions, weights = instruction_measure(task("t", "b", "a", "b", "c", "b"))
    assert instructions == ["b", "a", "c"]
    assert weights.dtype == torch.float64
    torch.testing.assert_close(weights, torch.tensor([3, 1, 1], dtype=torch.float64) / 5, rtol=0, atol=1e-15)
    assert instruction_measure([example("a"), example("b")], "uniform")[1].tolist() == [0.5, 0.5]
    assert instruction_measure(task("t", "a", "b", "b"), "uniform")[1].tolist() == [0.5, 0.5]


def test_measure_reads_what_tells_tasks_apart():
    """Of a turn that holds a question and then the instruction, the instruction alone (``instruction_part``)."""
    asked = [f"{question}\nAnswer with one word." for question in ("Which?", "How?")]
    turns = [example(text, instruction_span=(text.index("Answer"), len(text))) for text in asked]
    assert instruction_measure(turns)[0] == ["Answer with one word."]


def test_measures_that_do_not_exist():
    with pytest.raises(ConfigError, match="weights: 'equal' is unknown; expected one of real, uniform"):
        instruction_measure(task("t", "a"), "equal")
    with pytest.raises(DataError, match="task 'held-out': no training examples"):
        instruction_measure(Task("held-out", (), test=(example("a"),)))
    with pytest.raises(DataError, match=r"chats\.jsonl:3: the instruction is empty"):
        instruction_measure([example(" ", messages=(("user", " "), ("assistant", "hi")), source="chats.jsonl:3")])


def test_clouds_embed_each_instruction_once():
    embedder, seen = Counting(), []
    clouds, weights = task_clouds(
        [task("s", "a", "bb", "a", "a"), task("t", "bb", "ccc")],
        embedder,
        progress=lambda *numbers: seen.append(numbers),
    )
    assert embedder.asked == ["a", "bb", "ccc"]
    assert [cloud[:, 0].tolist() for cloud in clouds] == [[1, 2], [2, 3]]
    assert [share.tolist() for share in weights] == [[0.75, 0.25], [0.5, 0.5]]
    assert seen == [(3, 3)]


# -- the cache -----------------------------------------------------------------------------------------------------


def test_the_cache_embeds_a_text_once(tmp_path):
    first, second = Counting(), Counting()
    a = CachedEmbedder(first, tmp_path).embed(["a", "bb", "a"])
    assert first.asked == ["a", "bb"]
    b = CachedEmbedder(second, tmp_path).embed(["ccc", "bb", "a"])
    assert second.asked == ["ccc"]
    assert a[:, 0].tolist() == [1, 2, 1]
    assert b[:, 0].tolist() == [3, 2, 1]
    assert CachedEmbedder(Counting(), tmp_path).embed([]).shape[0] == 0


def test_the_cache_keeps_bits_and_goes_by_name(weight, tiny_tokenizer, tmp_path):
    plain = TokenMeanEmbedder(weight, tiny_tokenizer)
    assert torch.equal(CachedEmbedder(plain, tmp_path).embed(TEXTS), plain.embed(TEXTS))
    assert torch.equal(CachedEmbedder(plain, tmp_path).embed(TEXTS[::-1]), plain.embed(TEXTS[::-1]))
    other = TokenMeanEmbedder(2 * weight, tiny_tokenizer)
    assert torch.equal(CachedEmbedder(other, tmp_path).embed(TEXTS), other.embed(TEXTS))


def test_what_another_process_writes_is_seen(tmp_path):
    here = Counting()
    cached = CachedEmbedder(here, tmp_path)
    cached.embed(["a"])
    CachedEmbedder(Counting(), tmp_path).embed(["bb"])
    cached.embed(["bb"])
    assert here.asked == ["a"]


@pytest.mark.parametrize(
    "damage",
    [lambda raw: raw[:-3], lambda raw: raw[:-3] + b"\0\0\1", lambda raw: b"", lambda raw: raw[:5]],
    ids=["cut", "flipped", "empty", "header"],
)
@pytest.mark.parametrize("open_before", [True, False])
def test_damage_is_embedded_anew(tmp_path, damage, open_before, caplog):
    cached = CachedEmbedder(Counting(), tmp_path)
    expected = cached.embed(["a", "bb"])
    (file,) = tmp_path.glob("*/*.safetensors")
    file.write_bytes(damage(file.read_bytes()))
    again = Counting()
    reader = cached if open_before else CachedEmbedder(again, tmp_path)
    assert torch.equal(reader.embed(["bb", "a"]).flip(0), expected)
    assert "damaged, its embeddings are made anew" in caplog.text
    healthy = Counting()
    assert torch.equal(CachedEmbedder(healthy, tmp_path).embed(["a", "bb"]), expected)
    assert healthy.asked == []


def test_a_file_that_vanishes_is_embedded_anew(tmp_path):
    cached = CachedEmbedder(Counting(), tmp_path)
    expected = cached.embed(["a", "bb"])
    shutil.rmtree(tmp_path)
    assert torch.equal(cached.embed(["a", "bb"]), expected)


def test_work_so_far_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("cit_fast.embeddings.cache._ROWS_PER_FILE", 2)

    class Breaks(Counting):
        def embed(self, texts):
            if "ccc" in texts:
                raise RuntimeError("killed")
            return super().embed(texts)

    with pytest.raises(RuntimeError, match="killed"):
        CachedEmbedder(Breaks(), tmp_path).embed(["a", "bb", "ccc"])
    after = Counting()
    CachedEmbedder(after, tmp_path).embed(["a", "bb", "ccc"])
    assert after.asked == ["ccc"]


def test_a_cache_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        CachedEmbedder(Counting(), tmp_path / "file").embed(["a"])


def _embed_many(folder, offset):
    texts = ["x" * (offset + number) for number in range(1, 60)]
    for start in range(0, len(texts), 7):
        CachedEmbedder(Counting(), folder).embed(texts[start : start + 14])


def test_concurrent_processes(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_embed_many, args=(tmp_path, offset)) for offset in (0, 20, 40)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    after = Counting()
    texts = ["x" * number for number in range(1, 100)]
    points = CachedEmbedder(after, tmp_path).embed(texts)
    assert points[:, 0].tolist() == list(range(1, 100))
    assert after.asked == []


# -- sentence-embedding models -------------------------------------------------------------------------------------


def test_the_missing_library_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ConfigError, match=r"pip install 'cit-fast\[embeddings\]'"):
        SentenceEmbedder("anything")


@pytest.fixture(scope="module")
def sentence_model_folder(tiny_model_folder, tmp_path_factory):
    """A sentence-transformers model over the tiny Llama: mean pooling and a limit of 32 tokens."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.models")
    transformer = modules.Transformer(str(tiny_model_folder), max_seq_length=32)
    pooling = modules.Pooling(transformer.get_word_embedding_dimension(), "mean")
    folder = tmp_path_factory.mktemp("sentence-model")
    sentence_transformers.SentenceTransformer(modules=[transformer, pooling], device="cpu").save(str(folder))
    return folder


def test_sentence_model(sentence_model_folder, tmp_path):
    from sentence_transformers import SentenceTransformer

    embedder = SentenceEmbedder(sentence_model_folder, device="cpu")
    points = embedder.embed(TEXTS)
    expected = SentenceTransformer(str(sentence_model_folder), device="cpu").encode(TEXTS, convert_to_tensor=True)
    assert points.shape == (len(TEXTS), 32)
    assert points.dtype == torch.float32
    torch.testing.assert_close(points, expected)
    assert embedder.name == SentenceEmbedder(sentence_model_folder, device="cpu").name
    assert embedder.embed([]).shape == (0, 32)
    with pytest.raises(DataError, match="text 1: it is empty"):
        embedder.embed(["a", " "])
    built = build_embedder(str(sentence_model_folder), cache=tmp_path, device="cpu")
    assert built.name == embedder.name
    assert torch.equal(built.embed(TEXTS), built.embed(TEXTS))


def test_the_name_of_a_sentence_model_follows_its_weights_and_settings(sentence_model_folder, tmp_path):
    name = SentenceEmbedder(sentence_model_folder, device="cpu").name
    other = shutil.copytree(sentence_model_folder, tmp_path / "weights")
    tensors = load_file(other / "model.safetensors")
    first = sorted(tensors)[0]
    save_file({**tensors, first: tensors[first] + 1e-3}, other / "model.safetensors", {"format": "pt"})
    assert SentenceEmbedder(other, device="cpu").name != name
    shorter = shutil.copytree(sentence_model_folder, tmp_path / "shorter")
    for file, key in (("tokenizer_config.json", "model_max_length"), ("sentence_bert_config.json", "max_seq_length")):
        settings = json.loads((shorter / file).read_text())  # which of the two holds the limit depends on the release
        (shorter / file).write_text(json.dumps({**settings, key: 16}))
    assert SentenceEmbedder(shorter, device="cpu").name != name


def test_a_sentence_model_that_cannot_be_loaded(tmp_path):
    pytest.importorskip("sentence_transformers")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        SentenceEmbedder(tmp_path)
