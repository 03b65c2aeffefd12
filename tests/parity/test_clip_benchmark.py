"""CLIP_benchmark's own metric functions on our model give our evaluators' figures."""

import json
import sys
import types
from typing import Any

import jax
import numpy as np
import PIL.Image
import pytest
import torch
from flax import nnx

from pe_jax import sharding
from pe_jax.data.image import Preprocess
from pe_jax.evals import Retrieval, ZeroShot
from pe_jax.interop import clip_benchmark as ours
from pe_jax.models import zoo
from pe_jax.types import split

pytest.importorskip("clip_benchmark", reason="clip-benchmark is not installed; see docs/export.md")
if np.lib.NumpyVersion(np.__version__) >= "2.4.0":
    pytest.skip("CLIP_benchmark's accuracy needs NumPy below 2.4; see docs/export.md", allow_module_level=True)
zeroshot_classification = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
zeroshot_retrieval = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")

NAMES = ("red bars", "green bars", "blue bars", "grey dots", "white dots", "black dots", "a cat")
TEMPLATES = ("a photo of a {}.", "{}", "many {} together")
ARCH = {
    "vision": {"image_size": 16, "patch_size": 4, "width": 24, "depth": 2, "heads": 2, "mlp_width": 40}
    | {"class_token": True, "pool": "attention", "pool_heads": 2, "output_width": 20},
    "text": {"context_length": 12, "width": 32, "depth": 1, "heads": 4, "mlp_width": 36, "output_width": 20},
}


@pytest.fixture(scope="module")
def model() -> Any:
    params = jax.jit(lambda: split(zoo.build(ARCH, nnx.Rngs(3)))[1])()
    model = nnx.merge(split(zoo.abstract(ARCH))[0], params)
    model.preprocess = Preprocess(16, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    return model


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """37 pictures, of which each class has several and each picture two captions of its own; our source's config."""
    folder, random, lines = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0), []
    for i in range(37):
        image, label = random.integers(0, 120, (18, 21, 3)).astype(np.uint8), i * 5 % 7
        image[:, :: 2 + label, label % 3] += 120
        PIL.Image.fromarray(image).save(folder / f"{i}.png")
        captions = [f"picture {i} of {NAMES[label]}", f"number {i}"]
        lines.append({"image": f"{i}.png", "label": label, "captions": captions})
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"name": "jsonl", "path": str(folder / "data.jsonl")}


def loader(data: dict[str, Any], transform: Any, field: str, batch: int, **more: Any) -> torch.utils.data.DataLoader:
    """The same records as a torch data loader, as the harness makes one."""
    from pe_jax.data import sources

    source = sources.create(data)

    class Pairs(torch.utils.data.Dataset):
        classes = NAMES

        def __len__(self) -> int:
            return len(source)

        def __getitem__(self, index: int) -> tuple[Any, Any]:
            record = source[index]
            return transform(PIL.Image.open(record["image"])), record[field]

    return torch.utils.data.DataLoader(Pairs(), batch_size=batch, **more)


def captioned(rows: list[tuple[Any, Any]]) -> tuple[Any, list[Any]]:
    return torch.stack([image for image, _ in rows]), [captions for _, captions in rows]


@pytest.mark.parametrize("devices", [1, 8])
def test_zero_shot_classification(model, data, devices):
    graphdef, params = split(model)
    if devices > 1:
        params = jax.device_put(params, sharding.replicated(sharding.make_mesh({"data": devices})))
    placed = nnx.merge(graphdef, params)
    placed.preprocess = model.preprocess
    adapted, transform, tokenize = ours.adapt(placed)
    harness_templates = [template.replace("{}", "{c}") for template in TEMPLATES]
    classifier = zeroshot_classification.zero_shot_classifier(
        adapted, tokenize, NAMES, harness_templates, "cpu", amp=False
    )
    batches = loader(data, transform, "label", 8)
    logits, labels = zeroshot_classification.run_classification(adapted, classifier, batches, "cpu", amp=False)
    theirs = zeroshot_classification.evaluate(
        adapted.to("cpu").eval(), batches, tokenize, NAMES, harness_templates, "cpu", amp=False
    )
    result = ZeroShot(data, NAMES, TEMPLATES).result(model)
    np.testing.assert_allclose(logits.numpy(), 100 * result.cosines, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(labels.numpy(), result.labels)
    figures = result.figures
    assert theirs["acc1"] == pytest.approx(figures["top1"], abs=1e-6)
    assert theirs["mean_per_class_recall"] == pytest.approx(figures["mean_recall"], abs=1e-6)
    assert 0 < figures["top1"] < 1


def test_retrieval(model, data):
    adapted, transform, tokenize = ours.adapt(model)
    batches = loader(data, transform, "captions", 8, collate_fn=captioned)
    theirs = zeroshot_retrieval.evaluate(adapted, batches, tokenize, "cpu", amp=False, recall_k_list=[1, 5, 10])
    mine = Retrieval(data)(model)
    for k in (1, 5, 10):
        assert theirs[f"image_retrieval_recall@{k}"] == pytest.approx(mine[f"text_to_image_r{k}"], abs=1e-6)
        assert theirs[f"text_retrieval_recall@{k}"] == pytest.approx(mine[f"image_to_text_r{k}"], abs=1e-6)
    assert 0 < mine["text_to_image_r10"] < 1


def test_the_harness_loads_our_models_by_its_own_function(model, monkeypatch):
    models = types.ModuleType("models")  # the harness's own needs open_clip and more; the two names are all we touch
    models.TYPE2FUNC, models.MODEL_TYPES = {}, ["open_clip"]
    monkeypatch.setattr("clip_benchmark.models", models, raising=False)
    monkeypatch.setitem(sys.modules, "clip_benchmark.models", models)
    ours.register()
    ours.register()
    assert models.MODEL_TYPES == ["open_clip", "pe_jax"] and models.TYPE2FUNC["pe_jax"] is ours.load


def test_images_of_another_transform_and_models_without_text_are_refused(model):
    adapted, _, _ = ours.adapt(model)
    with pytest.raises(ValueError, match=r"torch\.float32; want uint8 from this model's own transform"):
        adapted.encode_image(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="CLIP_benchmark compares images with texts"):
        ours.adapt(model.vision)
