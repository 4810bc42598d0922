//! Files of a managed server: its configuration, the ports it took, the address left for other processes, the lock.

use std::fs::{File, OpenOptions, TryLockError};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::errors::BusError;
use crate::managed::ManagedOptions;

/// Share of the free disk that streams may take: a full disk leaves a server that only times out.
const DISK_SHARE_PERCENT: u64 = 80;
/// Memory streams of a managed server.
const MEMORY_STORE_BYTES: u64 = 256 << 20;

/// Takes the folder for this process.
pub(crate) fn lock_folder(store_dir: &Path) -> Result<File, BusError> {
    std::fs::create_dir_all(store_dir).map_err(|error| failed(store_dir, &error))?;
    let path = store_dir.join("millrace.lock");
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
    let file = file.map_err(|error| failed(&path, &error))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(BusError::ServerStart {
            message: format!(
                "{} is in use by another process, or by a nats-server that outlived one (its address is in the file \
                 `url` there); set [nats] store_dir to another folder",
                store_dir.display()
            ),
        }),
        Err(TryLockError::Error(error)) => Err(failed(&path, &error)),
    }
}

/// Writes the server's configuration; without a port it takes a free one.
pub(crate) fn write(options: &ManagedOptions, port: Option<u16>) -> Result<PathBuf, BusError> {
    let dir = &options.store_dir;
    let max_store = match options.max_store_bytes {
        Some(bytes) => bytes,
        // What streams hold already is not free and still theirs.
        None => (free_disk_bytes(dir)? + folder_bytes(&dir.join("jetstream"))) / 100 * DISK_SHARE_PERCENT,
    };
    let port = port.map_or("-1".to_string(), |port| port.to_string());
    forget_ports(dir);
    let text = format!(
        "# Written by millrace at every start; changes are lost.\n\
         host: 127.0.0.1\n\
         port: {port}\n\
         server_name: millrace-managed\n\
         ports_file_dir: {dir}\n\
         max_payload: {max_payload}\n\
         write_deadline: \"10s\"\n\
         jetstream {{\n  store_dir: {dir}\n  max_file_store: {max_store}\n  max_memory_store: {MEMORY_STORE_BYTES}\n}}\n",
        dir = quoted(dir)?,
        max_payload = options.max_payload_bytes,
    );
    let path = dir.join("nats-server.conf");
    std::fs::write(&path, text).map_err(|error| failed(&path, &error))?;
    Ok(path)
}

/// The address the server wrote once it listened.
pub(crate) fn ports(store_dir: &Path, pid: u32) -> Option<String> {
    #[derive(Deserialize)]
    struct Ports {
        nats: Vec<String>,
    }
    // Older servers name the file after the binary, so only the process id is sure.
    let ending = format!("_{pid}.ports");
    let entries = std::fs::read_dir(store_dir).ok()?;
    let file = entries.flatten().find(|entry| entry.file_name().to_string_lossy().ends_with(&ending))?;
    let text = std::fs::read_to_string(file.path()).ok()?;
    // Half a file does not parse and is read again.
    serde_json::from_str::<Ports>(&text).ok()?.nats.into_iter().next()
}

/// Removes what killed servers left: a process id can come again.
fn forget_ports(dir: &Path) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.path().extension().is_some_and(|ending| ending == "ports") {
            // A file that stays can only mislead if its process id comes again.
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// Leaves the address for other processes of this user.
pub(crate) fn record_url(store_dir: &Path, url: &str) -> Result<(), BusError> {
    let path = store_dir.join("url");
    std::fs::write(&path, url).map_err(|error| failed(&path, &error))
}

/// The address left by the last server of this folder.
pub(crate) fn recorded_url(store_dir: &Path) -> Option<String> {
    let text = std::fs::read_to_string(store_dir.join("url")).ok()?;
    Some(text.trim().to_string()).filter(|url| url.starts_with("nats://"))
}

fn free_disk_bytes(dir: &Path) -> Result<u64, BusError> {
    let stat = nix::sys::statvfs::statvfs(dir)
        .map_err(|error| BusError::ServerStart { message: format!("{}: {error}", dir.display()) })?;
    Ok(stat.blocks_available().saturating_mul(stat.fragment_size()))
}

/// Bytes of all files below a folder, as far as they can be read.
fn folder_bytes(dir: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(dir) else { return 0 };
    let bytes = entries.flatten().map(|entry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => folder_bytes(&entry.path()),
        Ok(metadata) => metadata.len(),
        Err(_) => 0,
    });
    bytes.sum()
}

/// A path as nats-server's configuration takes it.
fn quoted(path: &Path) -> Result<String, BusError> {
    match path.to_str().filter(|text| !text.contains(['"', '\\', '\n'])) {
        Some(text) => Ok(format!("\"{text}\"")),
        None => Err(BusError::ServerStart {
            message: format!("[nats] store_dir {} holds characters that nats-server does not take", path.display()),
        }),
    }
}

fn failed(path: &Path, error: &std::io::Error) -> BusError {
    BusError::ServerStart { message: format!("{}: {error}", path.display()) }
}
