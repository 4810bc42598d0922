//! Jobs that the server sends to a pull which nobody waits for any more. None may wait for its ack wait.

use std::time::Duration;

use millrace_bus::Bus;
use millrace_protocol::Class;
use millrace_runtime::Clock;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

use crate::support::{nats, soon, streams};

const WAIT: Duration = Duration::from_secs(10);
const ASK: &str = "PUB $JS.API.CONSUMER.MSG.NEXT.";

/// The server's side of one connection, played by the test: a real one cannot be told when to send.
struct Wire {
    stream: BufReader<TcpStream>,
}

impl Wire {
    /// A bus that talks to the test.
    async fn open() -> (Self, Bus) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("nats://{}", listener.local_addr().unwrap());
        let bus = tokio::spawn(async move { Bus::connect(&nats(&url), &streams(), "test", Clock::system()).await });
        let mut wire = Self { stream: BufReader::new(listener.accept().await.unwrap().0) };
        let info =
            r#"{"server_id":"S","version":"2.15.1","jetstream":true,"headers":true,"proto":1,"max_payload":1048576}"#;
        wire.send(&format!("INFO {info}")).await;
        wire.until("PING").await;
        (wire, bus.await.unwrap().unwrap())
    }

    async fn send(&mut self, text: &str) {
        self.stream.write_all(format!("{text}\r\n").as_bytes()).await.unwrap();
    }

    /// Reads up to the operation that starts so, and returns its words and its payload. Answers pings.
    async fn until(&mut self, start: &str) -> (Vec<String>, String) {
        soon(async {
            loop {
                let (words, payload) = self.operation().await;
                if words.join(" ").starts_with(start) {
                    return (words, payload);
                }
            }
        })
        .await
    }

    async fn operation(&mut self) -> (Vec<String>, String) {
        let mut line = String::new();
        assert_ne!(self.stream.read_line(&mut line).await.unwrap(), 0, "closed");
        let words: Vec<_> = line.split_whitespace().map(String::from).collect();
        let mut payload = Vec::new();
        if words[0] == "PUB" {
            payload.resize(words.last().unwrap().parse::<usize>().unwrap() + 2, 0);
            self.stream.read_exact(&mut payload).await.unwrap();
        }
        if words[0] == "PING" {
            self.send("PONG").await;
        }
        (words, String::from_utf8(payload).unwrap().trim_end().to_string())
    }
}

#[tokio::test]
async fn a_job_sent_just_before_the_end_of_a_dropped_pull_goes_back() {
    let (mut wire, bus) = Wire::open().await;
    let consumer = bus.job_consumer(Class::Batch);
    let pull = tokio::spawn(async move { consumer.pull(1, WAIT).await });
    wire.until(ASK).await;
    pull.abort();
    let (unsubscribed, _) = wire.until("UNSUB").await;
    // The client reads something else first.
    wire.send("PING").await;
    wire.until("PONG").await;
    let ack_subject = "$JS.ACK.JOBS.pre-batch.1.7.7.1700000000123456789.0";
    wire.send(&format!("MSG jobs.batch.demo.a {} {ack_subject} 2\r\n{{}}", unsubscribed[1])).await;
    let (words, payload) = wire.until("PUB $JS.ACK").await;
    assert_eq!((words[1].as_str(), payload.as_str()), (ack_subject, "-NAK"));
    assert_eq!(bus.events().orphans(), 1);
}
