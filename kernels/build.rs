//! Compiles device code to fatbins under feature `cuda`; does nothing without it.
//!
//! nvcc is looked for in `CUDA_HOME`, on `PATH`, and in a folder `cuda-toolchain` beside or above the build's output, where
//! `need_nvcc` of deploy/tools.sh puts the pinned PyPI packages. Each `cuda/<stem>.cu` becomes one fatbin: sm_90a machine code,
//! and sm_80 machine code and PTX for other cards. A file is compiled again only if it, a header or the flags changed.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::{env, fs};

const FLAGS: [&str; 7] = [
    "-fatbin",
    "-std=c++17",
    "-O3",
    "--expt-relaxed-constexpr",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-gencode=arch=compute_80,code=[sm_80,compute_80]",
    "-Icuda/include",
];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo::rerun-if-changed=cuda");
    println!("cargo::rerun-if-env-changed=CUDA_HOME");
    if let Err(what) = build() {
        println!("cargo::error={what}");
    }
}

fn build() -> Result<(), String> {
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let nvcc = find_nvcc(&out).ok_or(
        "feature `cuda` needs nvcc 12.8 or newer: none in $CUDA_HOME/bin, on PATH, or in target/cuda-toolchain. Get the pinned \
         one with `./tests/run.sh --only-nvcc`, or build without the feature.",
    )?;
    let mut sources = files("cuda", "cu")?;
    sources.sort();
    let mut shared = String::new();
    for header in files("cuda/include", "cuh")? {
        shared.push_str(&fs::read_to_string(&header).map_err(|error| format!("{}: {error}", header.display()))?);
    }
    let waiting = Mutex::new(sources.clone());
    let failures = Mutex::new(Vec::new());
    let workers = std::thread::available_parallelism().map_or(1, |count| count.get());
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while let Some(source) = waiting.lock().ok().and_then(|mut list| list.pop()) {
                    if let Err(what) = compile(&nvcc, &source, &shared, &out) {
                        failures.lock().map(|mut list| list.push(what)).unwrap_or_default();
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap_or_default();
    if !failures.is_empty() {
        return Err(failures.join("; "));
    }
    let mut table = String::from(
        "/// Stem of each file of device code, and its fatbin.\npub(super) static FATBINS: &[(&str, &[u8])] = &[\n",
    );
    for source in &sources {
        let stem = stem(source)?;
        table.push_str(&format!("    ({stem:?}, include_bytes!(concat!(env!(\"OUT_DIR\"), \"/{stem}.fatbin\"))),\n"));
    }
    table.push_str("];\n");
    fs::write(out.join("fatbins.rs"), table).map_err(|error| error.to_string())
}

fn stem(source: &Path) -> Result<&str, String> {
    source.file_stem().and_then(|stem| stem.to_str()).ok_or_else(|| format!("{}: no plain name", source.display()))
}

fn files(folder: &str, extension: &str) -> Result<Vec<PathBuf>, String> {
    let entries = fs::read_dir(folder).map_err(|error| format!("{folder}: {error}"))?;
    let paths = entries.filter_map(|entry| entry.ok().map(|entry| entry.path()));
    Ok(paths.filter(|path| path.extension().is_some_and(|own| own == extension)).collect())
}

fn find_nvcc(out: &Path) -> Option<PathBuf> {
    let home = env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("bin"));
    let path: Vec<PathBuf> = env::var_os("PATH").map(|path| env::split_paths(&path).collect()).unwrap_or_default();
    let fetched = out.ancestors().map(|folder| folder.join("cuda-toolchain/nvidia/cu13/bin"));
    home.into_iter().chain(path).chain(fetched).map(|folder| folder.join("nvcc")).find(|nvcc| nvcc.is_file())
}

fn compile(nvcc: &Path, source: &Path, shared: &str, out: &Path) -> Result<(), String> {
    let name = stem(source)?;
    let text = fs::read_to_string(source).map_err(|error| format!("{}: {error}", source.display()))?;
    let mut hasher = DefaultHasher::new();
    (text, shared, FLAGS, nvcc).hash(&mut hasher);
    let stamp = hasher.finish().to_string();
    let (fatbin, stamp_file) = (out.join(format!("{name}.fatbin")), out.join(format!("{name}.stamp")));
    if fatbin.is_file() && fs::read_to_string(&stamp_file).is_ok_and(|known| known == stamp) {
        return Ok(());
    }
    let run = Command::new(nvcc).args(FLAGS).arg(source).arg("-o").arg(&fatbin).output();
    let run = run.map_err(|error| format!("{}: {error}", nvcc.display()))?;
    if !run.status.success() {
        let said = String::from_utf8_lossy(&run.stderr).replace('\n', " | ");
        return Err(format!("nvcc {}: {said}", source.display()));
    }
    fs::write(stamp_file, stamp).map_err(|error| error.to_string())
}
