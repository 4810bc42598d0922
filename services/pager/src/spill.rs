//! The spill folder: one file a page, in a folder of this process's own. A lock file tells the folders of
//! living processes from those that a crash left behind; the latter are removed at the next start.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use tempfile::TempDir;

use crate::error::PagerError;

const PREFIX: &str = "pages-";
const LOCK: &str = "owner.lock";
const START_LOCK: &str = "start.lock";

/// This process's spill folder; removed with everything in it at drop.
pub(crate) struct SpillDir {
    folder: TempDir,
    /// Held for as long as the folder is in use.
    _owner: File,
}

impl SpillDir {
    /// Removes what dead processes left under `root` and makes a folder of our own.
    pub(crate) fn create(root: &Path) -> Result<Self, PagerError> {
        fs::create_dir_all(root).map_err(PagerError::io(root))?;
        // One process at a time in here: a folder exists for a moment before its lock is taken.
        let start_path = root.join(START_LOCK);
        let start = File::create(&start_path).map_err(PagerError::io(&start_path))?;
        start.lock().map_err(PagerError::io(&start_path))?;
        remove_stale(root)?;
        let folder = tempfile::Builder::new().prefix(PREFIX).tempdir_in(root).map_err(PagerError::io(root))?;
        let owner_path = folder.path().join(LOCK);
        let owner = File::create(&owner_path).map_err(PagerError::io(&owner_path))?;
        owner.lock().map_err(PagerError::io(&owner_path))?;
        Ok(Self { folder, _owner: owner })
    }

    /// Where the folder is.
    #[cfg(test)]
    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// File of a page.
    pub(crate) fn file(&self, page: u64) -> PathBuf {
        self.folder.path().join(format!("{page}.page"))
    }

    /// Writes a page's file.
    pub(crate) fn write(&self, page: u64, bytes: &[u8]) -> Result<(), PagerError> {
        let path = self.file(page);
        fs::write(&path, bytes).map_err(|source| {
            // Half a file would hold disk space that nobody counts.
            let _ = fs::remove_file(&path);
            PagerError::Io { path: path.clone(), source }
        })
    }

    /// Deletes a page's file; a failure costs disk space until the process ends, so it is only reported.
    pub(crate) fn remove(&self, page: u64) {
        let path = self.file(page);
        if let Err(error) = fs::remove_file(&path) {
            tracing::warn!(path = %path.display(), %error, "spilled page not removed");
        }
    }
}

/// Reads a page's file and checks its checksum.
pub(crate) fn read(path: &Path, page: u64, hash: &[u8; 16]) -> Result<Bytes, PagerError> {
    let bytes = fs::read(path).map_err(PagerError::io(path))?;
    if &checksum(&bytes) != hash {
        return Err(PagerError::Corrupt(page));
    }
    Ok(Bytes::from(bytes))
}

/// First 16 bytes of the content's BLAKE3 hash.
pub(crate) fn checksum(bytes: &[u8]) -> [u8; 16] {
    let mut out = [0; 16];
    out.copy_from_slice(&blake3::hash(bytes).as_bytes()[..16]);
    out
}

fn remove_stale(root: &Path) -> Result<(), PagerError> {
    for entry in fs::read_dir(root).map_err(PagerError::io(root))? {
        let entry = entry.map_err(PagerError::io(root))?;
        let ours = entry.file_name().to_string_lossy().starts_with(PREFIX);
        if ours && is_abandoned(&entry.path()) {
            tracing::info!(path = %entry.path().display(), "removing the spill folder of a dead process");
            fs::remove_dir_all(entry.path()).map_err(PagerError::io(entry.path()))?;
        }
    }
    Ok(())
}

/// A folder whose lock nobody holds. One that cannot be examined is left alone.
fn is_abandoned(folder: &Path) -> bool {
    match File::open(folder.join(LOCK)) {
        Ok(lock) => lock.try_lock().is_ok(),
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}
