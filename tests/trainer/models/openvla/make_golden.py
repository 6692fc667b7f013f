"""Write tests/data/openvla from the upstream code, in an environment of its own; see `test_golden.py` for the commands.

    python make_golden.py UPSTREAM OUT

UPSTREAM holds configuration_prismatic.py, modeling_prismatic.py and processing_prismatic.py of openvla (prismatic/extern/hf)
and an empty __init__.py.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
import hashed

_library = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):  # torchvision's own binary may not fit this torch; the transforms need none of it
    _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

DINO, SIGLIP = "vit_tiny_patch14_reg4_dinov2", "vit_tiny_patch14_siglip"
MEANS, STDS = [[0.485, 0.456, 0.406], [0.5, 0.5, 0.5]], [[0.229, 0.224, 0.225], [0.5, 0.5, 0.5]]
SHAPES = [
    {"width": 32, "depth": 3, "num_heads": 2, "mlp_width": 128, "patch_size": 14, "num_registers": 4,
     "has_class_token": True, "has_layer_scale": True, "has_attention_pool": False},
    {"width": 48, "depth": 4, "num_heads": 3, "mlp_width": 160, "patch_size": 14, "num_registers": 0,
     "has_class_token": False, "has_layer_scale": False, "has_attention_pool": True},
]  # fmt: skip
TEXT = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 32064, "pad_token_id": 32000, "rms_norm_eps": 1e-5,
}  # fmt: skip
STATISTICS = {
    "golden": {
        "action": {
            "q01": [-0.5, -0.25, -1.0, 0.0, -0.1, 0.125, 0.0],
            "q99": [0.5, 0.75, 1.0, 0.0, 0.3, 2.0, 1.0],
            "mask": [True] * 6 + [False],
        }
    }
}


def register_towers(names: list[str], shapes: list[dict[str, Any]]) -> None:
    """timm's own models with the options of the two real towers, smaller."""
    timm = importlib.import_module("timm")
    transformer = importlib.import_module("timm.models.vision_transformer")

    def make(shape: dict[str, Any], extra: dict[str, Any]) -> Any:
        def build(pretrained: bool = False, **kwargs: Any) -> Any:
            kwargs = {name: value for name, value in kwargs.items() if name in ("img_size", "num_classes", "act_layer")}
            sizes = {"embed_dim": shape["width"], "depth": shape["depth"], "num_heads": shape["num_heads"]}
            ratio = shape["mlp_width"] / shape["width"]
            return transformer.VisionTransformer(
                patch_size=shape["patch_size"], mlp_ratio=ratio, **sizes, **extra, **kwargs
            )

        return build

    dino = make(shapes[0], {"init_values": 1e-5, "reg_tokens": 4, "no_embed_class": True})
    siglip = make(shapes[1], {"class_token": False, "global_pool": "map"})
    for name, build in zip(names, (dino, siglip), strict=True):
        build.__name__ = name
        globals()[name] = timm.models.register_model(build)


def build_model(upstream: str) -> Any:
    """OpenVLAForActionPrediction with every tensor hashed."""
    configuration = importlib.import_module(f"{upstream}.configuration_prismatic")
    modeling = importlib.import_module(f"{upstream}.modeling_prismatic")
    config = configuration.OpenVLAConfig(
        vision_backbone_id="dinosiglip-vit-so-224px", llm_backbone_id="llama2-7b-pure",
        arch_specifier="no-align+fused-gelu-mlp", image_resize_strategy="resize-naive",
        text_config=TEXT, norm_stats=STATISTICS, timm_model_ids=[DINO, SIGLIP], image_sizes=[56, 56],
        timm_override_act_layers=[None, None],
        auto_map={
            "AutoConfig": "configuration_prismatic.OpenVLAConfig",
            "AutoModelForVision2Seq": "modeling_prismatic.OpenVLAForActionPrediction",
        },
    )  # fmt: skip
    model = modeling.OpenVLAForActionPrediction(config).eval()
    hashes = {
        name: torch.from_numpy(hashed.weight(name, tuple(tensor.shape))) for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(hashes, strict=True)
    return model


def run(model: Any) -> dict[str, Any]:
    """Features, logits, loss, greedy tokens, an action."""
    pixels = torch.from_numpy(hashed.pixels())
    ids, mask = (torch.from_numpy(array) for array in hashed.token_rows())
    labels = torch.where(mask == 1, ids, -100)
    labels[:, :5] = -100
    dino, siglip = pixels.split([3, 3], dim=1)
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=mask, pixel_values=pixels, labels=labels)
        first = {"input_ids": ids[:1], "pixel_values": pixels[:1]}
        tokens = model.generate(**first, max_new_tokens=7, do_sample=False)
        return {
            "dino": model.vision_backbone.featurizer(dino),
            "siglip": model.vision_backbone.fused_featurizer(siglip),
            "projected": model.projector(model.vision_backbone(pixels)),
            "logits": output.logits[..., torch.from_numpy(hashed.logit_columns())],
            "loss": output.loss,
            "tokens": tokens,
            "action": model.predict_action(**first, unnorm_key="golden", do_sample=False),
        }


def images(upstream: str) -> dict[str, Any]:
    """What the upstream processor makes of our frames: float32[6, 56, 56] of one, uint8 levels of all."""
    processing = importlib.import_module(f"{upstream}.processing_prismatic")
    library = importlib.import_module("PIL.Image")
    found: dict[str, Any] = {}
    for strategy in ("resize-naive", "letterbox", "resize-crop"):
        processor = processing.PrismaticImageProcessor(
            use_fused_vision_backbone=True, image_resize_strategy=strategy, input_sizes=[[3, 56, 56]] * 2,
            interpolations=["bicubic"] * 2, means=MEANS, stds=STDS,
        )  # fmt: skip
        for kind in hashed.FRAME_SHAPES:
            pixels = processor.apply_transform(library.fromarray(hashed.frame(kind))).numpy()
            if (strategy, kind) == ("resize-naive", "landscape"):
                found["normalised"] = pixels
            levels = (pixels[3:] * 0.5 + 0.5) * 255
            found[f"levels/{strategy}/{kind}"] = np.round(levels).astype(np.uint8)
    return found


def main(upstream: Path, out: Path) -> None:
    """Write config.json, names.json and golden.npz."""
    sys.path.insert(0, str(upstream.parent))
    register_towers([DINO, SIGLIP], SHAPES)
    model = build_model(upstream.name)
    found = {name: np.asarray(value) for name, value in {**run(model), **images(upstream.name)}.items()}
    out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out / "golden.npz", **found)
    config = {**json.loads(model.config.to_json_string()), "vision_towers": SHAPES}
    (out / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    names = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    (out / "names.json").write_text(json.dumps(names, indent=0) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
