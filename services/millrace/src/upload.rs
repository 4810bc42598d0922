//! A file on its way into the media bucket: its name, and a reader that counts.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, ReadBuf};

/// Name of a file's content: equal files share one object.
///
/// # Errors
/// The file cannot be read.
pub async fn content_name(path: &Path) -> anyhow::Result<String> {
    let path: PathBuf = path.to_path_buf();
    Ok(tokio::task::spawn_blocking(move || hash(&path)).await??)
}

fn hash(path: &Path) -> std::io::Result<String> {
    let mut file = std::fs::File::open(path)?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 256 << 10];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(format!("b3-{}", hasher.finalize().to_hex())),
            read => hasher.update(&buffer[..read]),
        };
    }
}

/// A reader that reports how much was read.
pub struct Counting<R, F> {
    inner: R,
    report: F,
}

impl<R, F> Counting<R, F> {
    /// Reads `inner` and tells `report` the bytes of each piece.
    pub fn new(inner: R, report: F) -> Self {
        Self { inner, report }
    }
}

impl<R: AsyncRead + Unpin, F: Fn(u64) + Unpin> AsyncRead for Counting<R, F> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.inner).poll_read(context, buffer))?;
        (self.report)(u64::try_from(buffer.filled().len() - before).unwrap_or(u64::MAX));
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use tokio::io::AsyncReadExt;

    use super::*;

    #[tokio::test]
    async fn a_name_is_the_content_and_every_byte_is_counted() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let content: Vec<u8> = (0..700_001u32).map(|n| n.to_le_bytes()[0]).collect();
        std::fs::write(file.path(), &content).unwrap();
        let name = content_name(file.path()).await.unwrap();
        assert_eq!(name, format!("b3-{}", blake3::hash(&content).to_hex()));

        let counted = Cell::new(0);
        let mut reader = Counting::new(&content[..], |bytes| counted.set(counted.get() + bytes));
        let mut read = Vec::new();
        reader.read_to_end(&mut read).await.unwrap();
        assert!(read == content);
        assert_eq!(counted.get(), 700_001);
    }

    #[tokio::test]
    async fn a_missing_file_is_an_error() {
        assert!(content_name(Path::new("/no/such/file")).await.is_err());
    }
}
