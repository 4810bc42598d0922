//! From a media source to its bytes: base64, `data:` URLs, objects through the caller, files below allowed folders.

use std::future::Future;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use millrace_protocol::{ErrorCode, JobError, Source};

/// What the caller fetches for a job.
pub trait MediaFetch: Sync {
    /// An object of the media bucket.
    ///
    /// # Errors
    /// `media_missing` if there is none of that name, `too_large` if it has more than `most_bytes`.
    fn object(&self, name: &str, most_bytes: u64) -> impl Future<Output = Result<Bytes, JobError>> + Send;
}

/// Where a source's bytes are now.
#[derive(Clone, PartialEq)]
pub(crate) enum Located {
    /// In memory.
    Bytes(Bytes),
    /// In a file below an allowed folder, of allowed size.
    File(PathBuf),
}

/// A source's bytes and the media type it claims.
pub(crate) struct Found {
    pub(crate) at: Located,
    pub(crate) media_type: Option<String>,
}

/// Finds a source's bytes, at most `most_bytes` of them.
pub(crate) async fn find<F: MediaFetch>(
    source: &Source,
    fetch: &F,
    roots: &[PathBuf],
    most_bytes: u64,
) -> Result<Found, JobError> {
    let media_type = source.media_type.clone();
    let (bytes, media_type) = match (&source.data, &source.object, &source.url) {
        (Some(data), None, None) => (decode(data, most_bytes)?, media_type),
        (None, Some(name), None) => (fetch.object(name, most_bytes).await?, media_type),
        (None, None, Some(url)) => match url.split_once(':') {
            Some(("data", rest)) => {
                let (stated, bytes) = data_url(rest, most_bytes)?;
                (bytes, media_type.or(stated))
            }
            Some(("file", rest)) => {
                let file = allowed_file(rest, roots, most_bytes).await?;
                return Ok(Found { at: Located::File(file), media_type });
            }
            _ => {
                let text = "only data: and file:// URLs are read: store the bytes as an object and name it in `object`";
                return Err(JobError::new(ErrorCode::InvalidValue, text));
            }
        },
        _ => {
            let text = "a media source needs exactly one of `data`, `object` and `url`";
            return Err(JobError::new(ErrorCode::InvalidValue, text));
        }
    };
    check_length(bytes.len() as u64, most_bytes)?;
    Ok(Found { at: Located::Bytes(bytes), media_type })
}

impl Located {
    /// The bytes, read if they are in a file.
    pub(crate) async fn into_bytes(self) -> Result<Bytes, JobError> {
        match self {
            Self::Bytes(bytes) => Ok(bytes),
            Self::File(path) => tokio::fs::read(&path).await.map(Bytes::from).map_err(|error| missing(&path, &error)),
        }
    }
}

fn check_length(length: u64, most_bytes: u64) -> Result<(), JobError> {
    if length > most_bytes {
        let text = format!("a media source has {length} bytes; at most {most_bytes} are allowed");
        return Err(JobError::new(ErrorCode::TooLarge, text));
    }
    Ok(())
}

fn decode(text: &str, most_bytes: u64) -> Result<Bytes, JobError> {
    check_length((text.len() as u64 / 4).saturating_mul(3).saturating_sub(2), most_bytes)?;
    let bytes = STANDARD.decode(text).map_err(|error| {
        let text = format!("a media source is not base64 ({error}): use the standard alphabet with padding");
        JobError::new(ErrorCode::InvalidValue, text)
    })?;
    Ok(Bytes::from(bytes))
}

/// `[<media type>][;parameters];base64,<bytes>`, behind `data:`.
fn data_url(rest: &str, most_bytes: u64) -> Result<(Option<String>, Bytes), JobError> {
    let bad = || JobError::new(ErrorCode::InvalidValue, "a data: URL must read data:<media type>;base64,<bytes>");
    let (head, data) = rest.split_once(',').ok_or_else(bad)?;
    let head = head.strip_suffix(";base64").ok_or_else(bad)?;
    let media_type = head.split(';').next().filter(|text| !text.is_empty()).map(str::to_owned);
    Ok((media_type, decode(data, most_bytes)?))
}

/// The real path behind `file:` if it lies below one of `roots`. What lies elsewhere does not exist for jobs.
async fn allowed_file(rest: &str, roots: &[PathBuf], most_bytes: u64) -> Result<PathBuf, JobError> {
    let refuse = || {
        let text = "the file does not exist below a folder that `preprocess.file_roots` allows (file:///absolute/path)";
        JobError::new(ErrorCode::MediaMissing, text)
    };
    let path =
        rest.strip_prefix("//").filter(|path| path.starts_with('/')).and_then(percent_decoded).ok_or_else(refuse)?;
    let path = tokio::fs::canonicalize(path).await.map_err(|_| refuse())?;
    for root in roots {
        if let Ok(root) = tokio::fs::canonicalize(root).await
            && path.starts_with(&root)
        {
            let facts = tokio::fs::metadata(&path).await.map_err(|error| missing(&path, &error))?;
            if !facts.is_file() {
                return Err(refuse());
            }
            check_length(facts.len(), most_bytes)?;
            return Ok(path);
        }
    }
    Err(refuse())
}

fn missing(path: &Path, error: &std::io::Error) -> JobError {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    JobError::new(ErrorCode::MediaMissing, format!("{name} cannot be read: {error}"))
}

fn percent_decoded(text: &str) -> Option<String> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let mut digit = || char::from(bytes.next()?).to_digit(16);
        out.push((digit()? * 16 + digit()?) as u8);
    }
    String::from_utf8(out).ok().filter(|text| !text.contains('\0'))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Objects;

    impl MediaFetch for Objects {
        async fn object(&self, name: &str, _: u64) -> Result<Bytes, JobError> {
            if name == "clip" {
                Ok(Bytes::from_static(b"object"))
            } else {
                Err(JobError::new(ErrorCode::MediaMissing, name))
            }
        }
    }

    async fn bytes_of(source: Source, roots: &[PathBuf]) -> Result<(Vec<u8>, Option<String>), ErrorCode> {
        let found = find(&source, &Objects, roots, 10).await.map_err(|error| error.code)?;
        Ok((found.at.into_bytes().await.unwrap().to_vec(), found.media_type))
    }

    fn url(text: impl Into<String>) -> Source {
        Source { url: Some(text.into()), ..Source::default() }
    }

    #[tokio::test]
    async fn every_kind_of_source_is_found() {
        let data = Source { data: Some("aGVsbG8=".into()), ..Source::default() };
        assert_eq!(bytes_of(data, &[]).await, Ok((b"hello".to_vec(), None)));
        let object = Source { object: Some("clip".into()), media_type: Some("video/mp4".into()), ..Source::default() };
        assert_eq!(bytes_of(object, &[]).await, Ok((b"object".to_vec(), Some("video/mp4".into()))));
        assert_eq!(
            bytes_of(url("data:image/png;base64,aGVsbG8="), &[]).await,
            Ok((b"hello".to_vec(), Some("image/png".into())))
        );
    }

    #[tokio::test]
    async fn faults_have_codes() {
        let data = |text: &str| Source { data: Some(text.into()), ..Source::default() };
        assert_eq!(bytes_of(Source::default(), &[]).await, Err(ErrorCode::InvalidValue));
        assert_eq!(bytes_of(Source { url: Some("x".into()), ..data("aGk=") }, &[]).await, Err(ErrorCode::InvalidValue));
        assert_eq!(bytes_of(data("not base64!"), &[]).await, Err(ErrorCode::InvalidValue));
        assert_eq!(bytes_of(data(&"AAAA".repeat(9)), &[]).await, Err(ErrorCode::TooLarge));
        assert_eq!(bytes_of(url("https://example.org/a.png"), &[]).await, Err(ErrorCode::InvalidValue));
        assert_eq!(bytes_of(url("data:text/plain,hi"), &[]).await, Err(ErrorCode::InvalidValue));
        let object = Source { object: Some("other".into()), ..Source::default() };
        assert_eq!(bytes_of(object, &[]).await, Err(ErrorCode::MediaMissing));
    }

    #[tokio::test]
    async fn files_are_read_below_the_allowed_folders_only() {
        let root = tempfile::TempDir::new().unwrap();
        let (allowed, outside) = (root.path().join("allowed"), root.path().join("outside.bin"));
        std::fs::create_dir(&allowed).unwrap();
        std::fs::write(allowed.join("a b.bin"), b"file").unwrap();
        std::fs::write(allowed.join("large.bin"), [0; 11]).unwrap();
        std::fs::write(&outside, b"secret").unwrap();
        std::os::unix::fs::symlink(&outside, allowed.join("link.bin")).unwrap();
        let roots = [allowed.clone()];
        let at = |path: &str| url(format!("file://{}/{path}", allowed.display()));
        assert_eq!(bytes_of(at("a%20b.bin"), &roots).await, Ok((b"file".to_vec(), None)));
        assert_eq!(bytes_of(at("a%20b.bin"), &[]).await, Err(ErrorCode::MediaMissing));
        for path in ["../outside.bin", "link.bin", "none.bin", "", "%zz"] {
            assert_eq!(bytes_of(at(path), &roots).await, Err(ErrorCode::MediaMissing), "{path}");
        }
        assert_eq!(bytes_of(url("file://host/etc/passwd"), &roots).await, Err(ErrorCode::MediaMissing));
        assert_eq!(bytes_of(at("large.bin"), &roots).await, Err(ErrorCode::TooLarge));
    }
}
