"""The `llm` command line: the server's model is an entry of its extra-openai-models.yaml, then asked as any other."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

entry = {
    "model_id": "mine",
    "model_name": sys.argv[1],
    "api_base": os.environ["OPENAI_BASE_URL"],
    "api_key_name": "selfloop",
}
with tempfile.TemporaryDirectory() as folder:
    # YAML reads JSON.
    Path(folder, "extra-openai-models.yaml").write_text(json.dumps([entry]))
    Path(folder, "keys.json").write_text(json.dumps({"selfloop": os.environ["OPENAI_API_KEY"]}))
    command = [sys.executable, "-m", "llm", "-m", "mine", "-o", "max_tokens", "12", "--no-stream", "--no-log", "Hello"]
    done = subprocess.run(command, env={**os.environ, "LLM_USER_PATH": folder}, capture_output=True, check=True)
print(len(done.stdout), "bytes answered")
