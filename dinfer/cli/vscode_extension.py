"""dinfer's extension for VS Code: a package.json without code, which says that `dinfer dap` debugs the type "dinfer".

It is made here, as a .vsix file, since it names the Python in which dinfer is installed. To put a folder among VS
Code's extensions is not enough: VS Code takes in what comes there while it runs, and removes what came before.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, get_args

from dinfer.cli.vscode import DEBUG_TYPE, dinfer_entries
from dinfer.config import Schedule, SyncStrategy
from dinfer.errors import DinferError
from dinfer.files import make_folder
from dinfer.version import __version__

PUBLISHER, NAME = "dinfer", "dinfer-debug"

LANGUAGE = "dinferplan"
"""of the plan of a rank, which `dinfer dap` shows as its source; breakpoints can be set in it"""

EDITORS = ("code", "code-insiders", "codium", "cursor")
"""commands of VS Code and its kin, each of which takes --install-extension"""

INSTALL_S = 120.0

_TEXT, _FLAG, _NUMBER = {"type": "string"}, {"type": "boolean"}, {"type": "integer", "minimum": 1}

_CONTENT_TYPES = """\
<?xml version="1.0" encoding="utf-8"?>
<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types"><Default Extension=".json" \
ContentType="application/json"/><Default Extension=".vsixmanifest" ContentType="text/xml"/></Types>
"""

_VSIX_MANIFEST = """\
<?xml version="1.0" encoding="utf-8"?>
<PackageManifest Version="2.0.0" xmlns="http://schemas.microsoft.com/developer/vsx-schema/2011">
  <Metadata>
    <Identity Language="en-US" Id="{name}" Version="{version}" Publisher="{publisher}"/>
    <DisplayName>{title}</DisplayName>
    <Description xml:space="preserve">{about}</Description>
    <Categories>Debuggers</Categories>
    <Properties>
      <Property Id="Microsoft.VisualStudio.Code.Engine" Value="{engine}"/>
      <Property Id="Microsoft.VisualStudio.Code.ExtensionKind" Value="workspace"/>
    </Properties>
  </Metadata>
  <Installation><InstallationTarget Id="Microsoft.VisualStudio.Code"/></Installation>
  <Dependencies/>
  <Assets>
    <Asset Type="Microsoft.VisualStudio.Code.Manifest" Path="extension/package.json" Addressable="true"/>
  </Assets>
</PackageManifest>
"""


class NotInstalled(DinferError, RuntimeError):
    """The extension could not be installed; the message says what to do."""


def package() -> dict[str, Any]:
    """The extension's package.json."""
    found = re.match(r"\d+\.\d+\.\d+", __version__)
    launch, attach = dinfer_entries()
    return {
        "name": NAME,
        "publisher": PUBLISHER,
        "displayName": "dinfer",
        "description": "Debug distributed LLM inference: ranks as threads, steps by op, layer and chunk",
        "version": found[0] if found else "0.0.0",
        "license": "Apache-2.0",
        "engines": {"vscode": "^1.75.0"},
        "categories": ["Debuggers"],
        "extensionKind": ["workspace"],  # where Python is, also if that is another host
        "contributes": {
            "languages": [{"id": LANGUAGE, "aliases": ["dinfer plan"], "extensions": [f".{LANGUAGE}"]}],
            "breakpoints": [{"language": LANGUAGE}],
            "debuggers": [
                {
                    "type": DEBUG_TYPE,
                    "label": "dinfer",
                    "languages": [LANGUAGE],
                    "program": sys.executable,
                    "args": ["-m", "dinfer", "dap"],
                    "configurationAttributes": {"launch": _of_launch(), "attach": _of_attach()},
                    "initialConfigurations": [launch, attach],
                }
            ],
        },
    }


def write_extension(path: str | Path) -> Path:
    """Write the extension to a .vsix file; its path. Raises OSError."""
    about = package()
    metadata = _VSIX_MANIFEST.format(
        name=NAME, version=about["version"], publisher=PUBLISHER, title=about["displayName"],
        about=about["description"], engine=about["engines"]["vscode"],
    )  # fmt: skip
    target = make_folder(path)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("[Content_Types].xml", _CONTENT_TYPES)
        archive.writestr("extension.vsixmanifest", metadata)
        archive.writestr("extension/package.json", json.dumps(about, ensure_ascii=False, indent=4))
    return target


def install_extension() -> str:
    """Have VS Code's own command install it; what to say of that. Raises NotInstalled, OSError."""
    command = next(filter(None, map(shutil.which, EDITORS)), None)
    if command is None:
        raise NotInstalled(
            f"none of the commands {', '.join(EDITORS)} is found here: run this in VS Code's own terminal, or `dinfer "
            "vscode --extension dinfer.vsix` and, in VS Code, Extensions → … → Install from VSIX."
        )
    with tempfile.TemporaryDirectory() as folder:
        file = write_extension(Path(folder) / f"{NAME}.vsix")
        try:
            done = subprocess.run(
                [command, "--install-extension", str(file), "--force"],
                capture_output=True, text=True, timeout=INSTALL_S, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise NotInstalled(f"{command} has not answered within {INSTALL_S:g} s.") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise NotInstalled(f"{command} could not install the extension: {said}")
    return f"{command} has installed the extension {PUBLISHER}.{NAME}, which starts {sys.executable} -m dinfer dap."


def _of_launch() -> dict[str, Any]:
    """The JSON schema of a launch entry."""
    return {
        "properties": {
            "model": {**_TEXT, "description": 'folder of a checkpoint, or "demo"', "default": "demo"},
            "prompt": {**_TEXT, "description": "the prompt as text"},
            "promptFile": {**_TEXT, "description": "a UTF-8 file with the prompt"},
            "promptIds": {"type": "array", "items": {"type": "integer"}, "description": "token ids"},
            "config": {**_TEXT, "description": "a TOML file with parameters, as for `dinfer run --config`"},
            "ranks": {**_NUMBER, "description": "number of ranks"},
            "where": {**_TEXT, "description": '"ipyparallel", "threads", or a profile of ipyparallel'},
            "chunk_size": {**_NUMBER, "description": "tokens per chunk of the prompt"},
            "sync_strategy": {
                "enum": list(get_args(SyncStrategy)),
                "description": "who sends a block to whom",
            },
            "schedule": {"enum": list(get_args(Schedule)), "description": "the rule that lays ops on lanes"},
            "max_new_tokens": {**_NUMBER, "description": "most tokens to generate"},
            "stopOnEntry": {**_FLAG, "description": "stop before the first op", "default": True},
            "cwd": {**_TEXT, "description": "the folder of relative paths", "default": "${workspaceFolder}"},
        }
    }


def _of_attach() -> dict[str, Any]:
    return {
        "properties": {
            "profile": {**_TEXT, "description": "the profile of ipyparallel", "default": "default"},
            "cluster_id": {**_TEXT, "description": "the cluster's id, if it has one"},
            "ranks": {**_NUMBER, "description": "number of ranks"},
            "take": {**_FLAG, "description": "take the ranks over from the session that holds them"},
        }
    }
