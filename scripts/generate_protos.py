"""Generates from proto/ the Python code of the API, in src/entrypoints/grpc_api/gen, and its page, docs/api.md.

    python scripts/generate_protos.py           write it
    python scripts/generate_protos.py --check   exit 1 if what is there differs

The output is committed, so that nobody needs a compiler to run or read the service.
"""

import argparse
import filecmp
import re
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

import grpc_tools
from api_docs import page
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
TARGET = ROOT / "src" / "entrypoints" / "grpc_api" / "gen"
PAGE = ROOT / "docs" / "api.md"
PACKAGE = "entrypoints.grpc_api.gen"


def generate(target: Path) -> str:
    """Writes the generated packages below `target`, which must be empty; returns the page."""
    files = sorted(str(path.relative_to(PROTO)) for path in PROTO.rglob("*.proto"))
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    plugins = Path(sysconfig.get_path("scripts"))
    described = target / "described"
    arguments = [
        "protoc",
        "--include_source_info",
        f"--descriptor_set_out={described}",
        f"-I{PROTO}",
        f"-I{well_known}",
        f"--plugin=protoc-gen-mypy={plugins / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={plugins / 'protoc-gen-mypy_grpc'}",
        f"--python_out={target}",
        f"--grpc_python_out={target}",
        f"--mypy_out=quiet:{target}",
        f"--mypy_grpc_out=quiet:{target}",
        *files,
    ]
    if protoc.main(arguments) != 0:
        sys.exit("protoc failed")
    text = page(FileDescriptorSet.FromString(described.read_bytes()))
    described.unlink()
    for path in sorted(target.rglob("*_pb2_grpc.py*")):
        if not re.search(r"^class \w+Stub", path.read_text(), re.MULTILINE):
            path.unlink()  # a file without a service
    for path in [*target.rglob("*.py"), *target.rglob("*.pyi")]:
        # Our packages live below ours; the descriptors keep the names that clients know.
        path.write_text(
            re.sub(r"^from vidacoach", f"from {PACKAGE}.vidacoach", path.read_text(), flags=re.MULTILINE)
        )
    for folder in [target, *(path for path in target.rglob("*") if path.is_dir())]:
        (folder / "__init__.py").write_text('"""Generated from proto/. Never edited."""\n')
    return text


def differences(left: Path, right: Path) -> list[str]:
    """Files that are not the same in both trees."""
    trees = [
        {path.relative_to(tree) for path in tree.rglob("*.py*") if "__pycache__" not in path.parts}
        for tree in (left, right)
    ]
    changed = [path for path in trees[0] & trees[1] if not filecmp.cmp(left / path, right / path, shallow=False)]
    return sorted(map(str, (trees[0] ^ trees[1]) | set(changed)))


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 on a difference")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder) / "gen"
        fresh.mkdir()
        text = generate(fresh)
        stale = differences(TARGET, fresh) if TARGET.exists() else ["everything"]
        if not PAGE.exists() or PAGE.read_text() != text:
            stale.append(PAGE.name)
        if check:
            if stale:
                print("stale generated code, run `make proto`:", *stale, sep="\n  ", file=sys.stderr)
            return 1 if stale else 0
        shutil.rmtree(TARGET, ignore_errors=True)
        shutil.copytree(fresh, TARGET)
        PAGE.write_text(text)
    print(f"{len(stale)} files changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
