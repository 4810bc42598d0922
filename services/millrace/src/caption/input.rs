//! Opens what the command line names: a path, or `-` for standard input. Owns temporary copies; must not decode.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::Context;
use tempfile::NamedTempFile;

use super::kind::{HEAD_BYTES, MediaKind, is_gif, sniff};
use crate::exit::usage;

/// A file to caption.
#[derive(Debug)]
pub struct Input {
    /// As named on the command line.
    pub name: String,
    /// Where the bytes are.
    pub path: PathBuf,
    /// Their number.
    pub size_bytes: u64,
    /// What they are.
    pub kind: MediaKind,
    /// Set for standard input: ffprobe and the upload need a file that can be read twice.
    _copy: Option<NamedTempFile>,
}

impl Input {
    /// Opens `name`; `-` reads `stdin` to its end, at most `limit_bytes` (as for files).
    ///
    /// # Errors
    /// A usage fault that names the file: missing, not a file, empty, too large, or not a kind of media taken here.
    pub fn open(name: &str, limit_bytes: u64, stdin: &mut dyn Read) -> anyhow::Result<Self> {
        let copy = if name == "-" { Some(copy_of(stdin, limit_bytes)?) } else { None };
        let path = copy.as_ref().map_or_else(|| PathBuf::from(name), |copy| copy.path().to_path_buf());
        let meta = std::fs::metadata(&path).map_err(|error| usage(format!("{name}: {error}; check the path")))?;
        if !meta.is_file() {
            return Err(usage(format!("{name}: not a file; name the media files themselves")));
        }
        let size_bytes = meta.len();
        if size_bytes == 0 {
            return Err(usage(format!("{name}: the file is empty")));
        }
        if size_bytes > limit_bytes {
            return Err(too_large(name, limit_bytes));
        }
        let kind = kind_of(&path).with_context(|| format!("cannot read {name}"))?.ok_or_else(|| {
            usage(format!("{name}: not MP4, MKV, WebM, GIF, JPEG, PNG or WebP (by its first bytes); convert it first"))
        })?;
        Ok(Self { name: name.to_string(), path, size_bytes, kind, _copy: copy })
    }
}

fn kind_of(path: &Path) -> std::io::Result<Option<MediaKind>> {
    let mut file = File::open(path)?;
    let mut head = Vec::new();
    file.by_ref().take(u64::try_from(HEAD_BYTES).unwrap_or(u64::MAX)).read_to_end(&mut head)?;
    if is_gif(&head) {
        file.read_to_end(&mut head)?;
    }
    Ok(sniff(&head))
}

fn copy_of(stdin: &mut dyn Read, limit_bytes: u64) -> anyhow::Result<NamedTempFile> {
    let mut copy = NamedTempFile::with_prefix("millrace-stdin-").context("cannot make a temporary file")?;
    let copied = std::io::copy(&mut stdin.take(limit_bytes.saturating_add(1)), &mut copy)
        .context("cannot copy standard input to a temporary file")?;
    if copied > limit_bytes { Err(too_large("-", limit_bytes)) } else { Ok(copy) }
}

fn too_large(name: &str, limit_bytes: u64) -> anyhow::Error {
    usage(format!("{name}: larger than the media bucket takes ({limit_bytes} bytes); cut the file or raise that limit"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PNG: &[u8] = b"\x89PNG\r\n\x1a\nrest";

    fn fault(result: anyhow::Result<Input>) -> String {
        format!("{:#}", result.unwrap_err())
    }

    #[test]
    fn standard_input_becomes_a_file_that_goes_with_it() {
        let input = Input::open("-", 100, &mut &PNG[..]).unwrap();
        assert_eq!((input.kind, input.size_bytes), (MediaKind::Image("image/png"), 12));
        assert_eq!(std::fs::read(&input.path).unwrap(), PNG);
        let path = input.path.clone();
        drop(input);
        assert!(!path.exists());
    }

    #[test]
    fn each_bad_file_is_named_with_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str, bytes: &[u8]| {
            let path = folder.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            path.to_string_lossy().into_owned()
        };
        let open = |name: &str| Input::open(name, 20, &mut std::io::empty());
        assert!(fault(open("/no/such.mp4")).starts_with("/no/such.mp4: No such file"));
        assert!(fault(open(&folder.path().to_string_lossy())).contains("not a file"));
        assert!(fault(open(&at("empty.png", b""))).contains("empty"));
        assert!(fault(open(&at("text.mp4", b"hello"))).contains("not MP4"));
        assert!(fault(open(&at("big.png", &[b'x'; 21]))).contains("20 bytes"));
        assert!(open(&at("misnamed.txt", PNG)).is_ok());
        assert!(fault(Input::open("-", 11, &mut &PNG[..])).contains("11 bytes"));
    }
}
