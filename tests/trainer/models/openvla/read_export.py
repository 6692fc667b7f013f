"""Load an export with the published code, in the environment that `test_golden.py` describes, and write its logits.

python read_export.py UPSTREAM EXPORT IN.npz OUT.npz        (IN: ids, pixels; OUT: logits, q99)
"""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
import make_golden


def main(upstream: Path, export: Path, given: Path, out: Path) -> None:
    """Towers are registered in timm under the names of the export's config.json, since timm knows only the real ones."""
    sys.path.insert(0, str(upstream.parent))
    values = json.loads((export / "config.json").read_text())
    make_golden.register_towers(values["timm_model_ids"], values["vision_towers"])
    modeling = importlib.import_module(f"{upstream.name}.modeling_prismatic")
    model = modeling.OpenVLAForActionPrediction.from_pretrained(export, torch_dtype="auto").eval()
    arrays = np.load(given)
    with torch.no_grad():
        logits = model(
            input_ids=torch.from_numpy(arrays["ids"]), pixel_values=torch.from_numpy(arrays["pixels"])
        ).logits
    np.savez(out, logits=logits.numpy(), q99=np.array(model.get_action_stats("mani_openpi")["q99"]))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
