"""Compiles device code with nvcc, loads it and launches it through the driver, and times it. No Python package but torch."""
import ctypes
import glob
import os
import statistics
import subprocess

import torch

FLAGS = ["-cubin", "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-lineinfo", "-Xptxas", "-v", "-gencode=arch=compute_90a,code=sm_90a"]
CUDA = ctypes.CDLL("libcuda.so.1")


class Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16)]


class Config(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared")] + [
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(Attribute)), ("count", ctypes.c_uint)]


def check(code, what):
    if code != 0:
        text = ctypes.c_char_p()
        CUDA.cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"{what}: {code} {text.value}")


def compile_all(folder, out, variants):
    """variants: {name: (stem, [-D flags])}. Returns {name: path of cubin}; compiles at once what is not there yet."""
    running, done = {}, {}
    for name, (stem, defines) in variants.items():
        path = os.path.join(out, name + ".cubin")
        sources = [f"{folder}/{stem}.cu", *glob.glob(f"{folder}/include/*.cuh")]
        if os.path.exists(path) and all(os.path.getmtime(source) < os.path.getmtime(path) for source in sources):
            done[name] = path
            continue
        command = ["nvcc", *FLAGS, *defines, f"-I{folder}/include", f"{folder}/{stem}.cu", "-o", path]
        running[name] = (path, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    for name, (path, process) in running.items():
        log, _ = process.communicate()
        if process.returncode != 0:
            print(f"nvcc {name} failed:\n{log[-2000:]}")
            continue
        if " 0 bytes spill stores" not in log or any(" spill stores" in line and " 0 bytes spill stores" not in line for line in log.splitlines()):
            print(f"{name}: spills")
        done[name] = path
    return done


class Module:
    """A loaded cubin. `launch(kernel, grid, block, shared_bytes, *arguments)`: tensors, None, ints (32 bits), floats, and
    ctypes arrays, passed by value."""

    def __init__(self, path):
        torch.zeros(1, device="cuda")  # The context that the module goes to.
        self.module, self.functions = ctypes.c_void_p(), {}
        with open(path, "rb") as file:
            check(CUDA.cuModuleLoadData(ctypes.byref(self.module), file.read()), path)

    def function(self, kernel):
        if kernel not in self.functions:
            function = ctypes.c_void_p()
            check(CUDA.cuModuleGetFunction(ctypes.byref(function), self.module, kernel.encode()), kernel)
            self.functions[kernel] = function
        return self.functions[kernel]

    def launch(self, kernel, grid, block, shared, *arguments, overlap=False, cluster=0):
        function = self.function(kernel)
        if shared > 48 << 10:
            check(CUDA.cuFuncSetAttribute(function, 8, shared), f"{kernel}: {shared} bytes of shared memory")
        values = []
        for argument in arguments:
            if argument is None or isinstance(argument, torch.Tensor):
                values.append(ctypes.c_void_p(0 if argument is None else argument.data_ptr()))
            elif isinstance(argument, ctypes.Array):
                values.append(argument)
            else:
                values.append(ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int(argument))
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(value) for value in values])
        attributes = (Attribute * 2)()
        count = 0
        if overlap:
            attributes[count].id, attributes[count].value[0] = 6, 1  # Programmatic stream serialization.
            count += 1
        if cluster:
            attributes[count].id = 4  # Cluster dimension.
            attributes[count].value[0:3] = [cluster, 1, 1]
            count += 1
        grid = tuple(grid) + (1,) * (3 - len(grid))
        stream = torch.cuda.current_stream().cuda_stream
        config = Config(*grid, block, 1, 1, shared, stream, ctypes.cast(attributes, ctypes.POINTER(Attribute)), count)
        check(CUDA.cuLaunchKernelEx(ctypes.byref(config), function, pointers, None), f"{kernel} {grid} {block} {shared}")


def multiprocessors():
    return torch.cuda.get_device_properties(0).multi_processor_count


def median_us(calls, rounds=7, chain=1):
    """Median microseconds of one call: `calls` (each on buffers of its own) captured `chain` times in one graph, replayed."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(chain):
            for call in calls:
                call()
    times = []
    for turn in range(rounds + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if turn >= 2:
            times.append(begin.elapsed_time(end) * 1e3 / (chain * len(calls)))
    return statistics.median(times)


def copy_bytes_per_s():
    """Bytes read and written a second by a device-to-device copy of 4 GiB: of a kernel that copies, outside of a graph."""
    a = torch.randint(0, 255, (4 << 30,), dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    times = []
    for turn in range(9):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        b.copy_(a)
        end.record()
        end.synchronize()
        if turn >= 2:
            times.append(begin.elapsed_time(end) * 1e-3)
    return 2 * a.numel() / statistics.median(times)


def worst(out, plain, reference):
    """Error of `out` over that of a plain bf16 implementation, both as norms against a float64 reference."""
    norm = lambda x: ((x.double() - reference).norm() / reference.norm().clamp_min(1e-30)).item()
    own, other = norm(out), norm(plain)
    if not own == own:
        return float("inf"), own
    return (own / max(other, 1e-4)), own
