#!/usr/bin/env bash
# Stage 2 of the quickstart by LoRA instead of in full, from the same stage 1.5; run it when run.sh is done, in the same environment.
#
#   bash examples/quickstart/lora.sh [OUT]     OUT: the folder that run.sh made (default: quickstart)
#
# It ends with the share of the full run's gain in accuracy that the adapters reach: OUT/lora.json.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
out="$(cd "${1:-quickstart}" && pwd)"
cd "$here/../.."
source "$here/../find_python.sh"

"$python" -m torch.distributed.run --standalone --nproc-per-node 2 pretrain_vlm.py --config "$here/stage2_lora.yaml" \
    --data.train "$out/packs/mixed_train" --data.valid "$out/packs/mixed_valid" \
    --checkpoint.load "$out/runs/stage1_5" --checkpoint.save "$out/runs/stage2_lora" --checkpoint.export_hf "$out/exported/stage2_lora"
"$python" tools/evaluate.py 1.5="$out/exported/stage1_5" 2="$out/exported/stage2" lora="$out/exported/stage2_lora" --transformers \
    --tasks "$out/data/exam.jsonl" --packs "$out/packs/mixed_train" --max_new_tokens 6 --out "$out/evaluated_lora"
"$python" - "$out" <<'END'
import json
import sys
from pathlib import Path

out = Path(sys.argv[1])
found = json.loads((out / "evaluated_lora" / "summary.json").read_text())
right = {name: figures["exam/accuracy"] for name, figures in found.items()}
share = (right["lora"] - right["1.5"]) / (right["2"] - right["1.5"])
(out / "lora.json").write_text(json.dumps({"accuracy": right, "share_of_gain": share}, indent=2) + "\n")
print(f"accuracy {right}; LoRA reaches {share:.2f} of the gain of the full stage 2")
END
