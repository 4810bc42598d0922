//! The media bucket: whole objects, limits, absence.

use millrace_bus::Kind;
use millrace_config::Streams;

use crate::support::{server, streams};

fn content(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|i| u8::try_from(i * 31 % 251).unwrap()).collect()
}

#[tokio::test]
async fn objects_come_back_as_they_were() {
    let server = server().await;
    let bus = server.bus(&streams()).await;
    for bytes in [0, 1, (1_000 << 10) - 1, 1_000 << 10, 2_500_001] {
        let name = format!("clips/ä {bytes}.mp4");
        assert_eq!(bus.object_put(&name, &content(bytes)[..]).await.unwrap(), bytes as u64);
        assert_eq!(bus.object_get(&name, bytes as u64).await.unwrap(), content(bytes));
    }
    bus.object_put("clips/ä 1.mp4", &b"newer"[..]).await.unwrap();
    assert_eq!(bus.object_get("clips/ä 1.mp4", 5).await.unwrap(), "newer");
}

#[tokio::test]
async fn a_large_object_is_refused_unread_and_a_missing_one_by_name() {
    let server = server().await;
    let bus = server.bus(&streams()).await;
    bus.object_put("clip", &content(2_000)[..]).await.unwrap();
    let error = bus.object_get("clip", 1_999).await.unwrap_err();
    assert_eq!((error.label(), error.kind()), ("too_large", Kind::Reject));
    assert!(error.to_string().contains("2000 bytes"), "{error}");
    for name in ["none", "clip2"] {
        let error = bus.object_get(name, 10).await.unwrap_err();
        assert_eq!(error.label(), "object_missing");
        assert!(error.to_string().contains(name));
    }
    bus.object_delete("clip").await.unwrap();
    bus.object_delete("clip").await.unwrap();
    assert_eq!(bus.object_get("clip", 2_000).await.unwrap_err().label(), "object_missing");
}

#[tokio::test]
async fn a_full_bucket_is_an_overload() {
    let server = server().await;
    let bus = server.bus(&Streams { media_max_bytes: 1 << 20, ..streams() }).await;
    let error = bus.object_put("clip", &content(3 << 20)[..]).await.unwrap_err();
    assert_eq!((error.label(), error.kind()), ("overloaded", Kind::Retry), "{error}");
}
