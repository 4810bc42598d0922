//! A NATS server, schedulers and scripted executors per test. Must not hide what a test is about.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use actix::Addr;
use millrace_bus::{Bus, Follow, ManagedOptions, ManagedServer, Subscription};
use millrace_config::{Config, Environment, Nats, NatsUrl, Streams};
use millrace_protocol::ready::{Offer, OfferReply, ReadyJob, Shown};
use millrace_protocol::sampling::ResolvedSampling;
use millrace_protocol::{ActorId, Chunk, Class, Final, JobId, ModelName, OutputChunk};
use millrace_runtime::{Clock, DrainGate};
use millrace_scheduler::{Observe, SchedulerActor, SchedulerMetrics, SchedulerParts, Settings, Snapshot};
use millrace_telemetry::{Health, Registry};
use tokenizers::Tokenizer;
use tokio::sync::watch;

use crate::executor::Executor;

/// End-of-text token of the demo checkpoint.
pub const END: u32 = 1000;

pub fn model_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/demo/model")
}

pub fn tokens(text: &str) -> Vec<u32> {
    let tokenizer = Tokenizer::from_file(model_dir().join("tokenizer.json")).unwrap();
    tokenizer.encode(text, false).unwrap().get_ids().to_vec()
}

pub fn actor_id(text: &str) -> ActorId {
    ActorId::new(text).unwrap()
}

pub fn job_id(text: &str) -> JobId {
    JobId::new(text).unwrap()
}

pub fn model() -> ModelName {
    ModelName::new("demo").unwrap()
}

/// Fails the test instead of hanging it.
pub async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(40), future).await.expect("took longer than 40 s")
}

/// A server, a connection, and the parts of schedulers.
pub struct World {
    pub server: ManagedServer,
    pub bus: Bus,
    pub settings: Settings,
    pub health: Health,
    names: AtomicUsize,
    _dir: tempfile::TempDir,
}

/// A scheduler under test.
pub struct Scheduler {
    pub id: ActorId,
    pub addr: Addr<SchedulerActor>,
    pub drain: DrainGate,
    pub registry: Registry,
    pub fatal: watch::Receiver<Option<String>>,
}

impl World {
    pub async fn new() -> Self {
        Self::with(|_| {}).await
    }

    /// A world whose configuration `change` adapts.
    pub async fn with(change: impl FnOnce(&mut Config)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let options = ManagedOptions {
            binary: Environment::read().nats_server,
            store_dir: dir.path().to_path_buf(),
            max_payload_bytes: 1 << 20,
            max_store_bytes: Some(1 << 30),
        };
        let server = match ManagedServer::start(&options).await {
            Ok(server) => server,
            Err(error) => panic!("{error}"),
        };
        let mut config = Config::default();
        config.streams = Streams {
            jobs_max_bytes: 8 << 20,
            job_max_bytes: 256 << 10,
            out_max_bytes: 64 << 20,
            dlq_max_bytes: 1 << 20,
            media_max_bytes: 16 << 20,
            ack_wait: Duration::from_secs(3),
            ..config.streams
        };
        config.drain.timeout = Duration::from_secs(1);
        change(&mut config);
        let nats = Nats {
            url: NatsUrl::Url(server.url().to_owned()),
            request_timeout: Duration::from_secs(5),
            ..config.nats.clone()
        };
        let bus = Bus::connect(&nats, &config.streams, "test", Clock::system()).await.unwrap();
        bus.ensure_streams().await.unwrap();
        let settings = Settings::from_config(&config.scheduler, &config.streams, &config.drain).unwrap();
        Self { server, bus, settings, health: Health::new(), names: AtomicUsize::new(0), _dir: dir }
    }

    pub async fn scheduler(&self) -> Scheduler {
        let id = actor_id(&format!("scheduler-{}", self.names.fetch_add(1, Ordering::Relaxed)));
        let (drain, registry) = (DrainGate::new(), Registry::new());
        let (fatal, told) = watch::channel(None);
        let parts = SchedulerParts {
            id: id.clone(),
            model: model(),
            model_dir: model_dir(),
            bus: self.bus.clone(),
            settings: self.settings.clone(),
            metrics: SchedulerMetrics::new(&registry).unwrap(),
            health: self.health.clone(),
            clock: Clock::system(),
            drain: drain.clone(),
            fatal,
        };
        Scheduler { id, addr: SchedulerActor::start(parts).await.unwrap(), drain, registry, fatal: told }
    }

    /// Publishes a job, takes its delivery from the queue, and makes the offer of a preprocess actor named `node`.
    pub async fn delivered(&self, name: &str) -> Offer {
        let body = r#"{"prompt":"Hi"}"#;
        self.bus.publish_job(Class::Interactive, &model(), &job_id(name), body.into()).await.unwrap();
        self.redelivered(name).await
    }

    /// Publishes a job and offers its delivery to a scheduler that has an executor.
    pub async fn offered(&self, scheduler: &Scheduler, name: &str) -> Offer {
        scheduler.attached().await;
        let offer = self.delivered(name).await;
        assert_eq!(self.offer(scheduler, &offer).await, OfferReply::Accepted);
        offer
    }

    /// As [`Self::offered`], and `executor` has drawn six of the job's tokens, four of which are shown.
    pub async fn begun(&self, scheduler: &Scheduler, executor: &Executor, name: &str) -> Offer {
        let offer = self.offered(scheduler, name).await;
        executor.steps(6);
        self.shows(name, 4).await;
        offer
    }

    /// The queue's next delivery, as an offer with what is stored of the job.
    pub async fn redelivered(&self, name: &str) -> Offer {
        let consumer = self.bus.job_consumer(Class::Interactive);
        let delivery = soon(async {
            loop {
                if let Some(delivery) = consumer.pull(1, Duration::from_secs(5)).await.unwrap().pop() {
                    return delivery.delivery;
                }
            }
        })
        .await;
        Offer { ready: ready(name), delivery, shown: self.shown(name).await, from: actor_id("node") }
    }

    /// What a preprocess actor reads from the output subject.
    pub async fn shown(&self, name: &str) -> Shown {
        let mut shown = Shown::default();
        for (sequence, chunk) in self.bus.out_read(&job_id(name)).await.unwrap() {
            shown.last_seq = sequence;
            if let Chunk::Delta { token_ids, text, .. } = chunk.chunk {
                shown.token_ids.extend(token_ids);
                shown.text.push_str(&text);
            }
        }
        shown
    }

    pub async fn offer(&self, scheduler: &Scheduler, offer: &Offer) -> OfferReply {
        let subject = self.bus.subjects().offer(&scheduler.id);
        let body = postcard::to_stdvec(offer).unwrap().into();
        let reply = self.bus.request(&subject, body, Duration::from_secs(5)).await.unwrap();
        postcard::from_bytes(&reply).unwrap()
    }

    /// Everything stored for a job, once its final is.
    pub async fn output(&self, name: &str) -> Output {
        let follow = self.bus.follow(&job_id(name), 0).await.unwrap();
        self.followed(name, follow).await
    }

    /// As [`Self::output`], by a subscriber that was there before.
    pub async fn followed(&self, name: &str, mut follow: Follow) -> Output {
        let mut seen = Vec::new();
        soon(async {
            while let Some(next) = follow.next().await {
                seen.push(next.unwrap());
            }
        })
        .await;
        assert_eq!(seen, self.bus.out_read(&job_id(name)).await.unwrap(), "shown is what is stored");
        Output::of(seen.into_iter().map(|(_, chunk)| chunk).collect())
    }

    /// Waits until this many tokens of a job are shown.
    pub async fn shows(&self, name: &str, count: usize) {
        let job = job_id(name);
        soon(async {
            let mut follow = self.bus.follow(&job, 0).await.unwrap();
            let mut seen = 0;
            while seen < count {
                let (_, chunk) = follow.next().await.expect("not ended yet").unwrap();
                if let Chunk::Delta { token_ids, .. } = chunk.chunk {
                    seen += token_ids.len();
                }
            }
        })
        .await;
    }

    /// Whether nothing is left in the work queue.
    pub async fn queue_is_empty(&self) -> bool {
        let consumer = self.bus.job_consumer(Class::Interactive);
        consumer.pull(1, self.settings.ack_wait + Duration::from_millis(500)).await.unwrap().is_empty()
    }

    pub async fn leases(&self) -> Subscription {
        let subject = self.bus.subjects().page_lease(&actor_id("node"));
        self.bus.subscribe(&subject, 100, None).await.unwrap()
    }
}

impl Scheduler {
    pub async fn snapshot(&self) -> Snapshot {
        let snapshot = self.addr.send(Observe).await.expect("the actor lives");
        assert_eq!((&snapshot.imbalance, self.fatal.borrow().as_ref()), (&None, None));
        snapshot
    }

    /// Waits for a state.
    pub async fn until(&self, what: impl Fn(&Snapshot) -> bool) -> Snapshot {
        soon(async {
            let mut ticks = tokio::time::interval(Duration::from_millis(10));
            loop {
                ticks.tick().await;
                let snapshot = self.snapshot().await;
                if what(&snapshot) {
                    return snapshot;
                }
            }
        })
        .await
    }

    pub async fn attached(&self) -> Snapshot {
        self.until(|snapshot| snapshot.executor.is_some()).await
    }

    pub fn metric(&self, name: &str) -> f64 {
        let families = self.registry.gather();
        let family = families.iter().find(|family| family.name() == name).unwrap_or_else(|| panic!("no {name}"));
        family.get_metric().iter().map(|metric| metric.get_counter().get_value()).sum()
    }
}

/// A job that answers with what its executor is scripted to.
pub fn ready(name: &str) -> ReadyJob {
    ReadyJob {
        job: job_id(name),
        model: model(),
        class: Class::Interactive,
        prompt: (0..20).collect(),
        media: vec![],
        sampling: ResolvedSampling::greedy(),
        max_tokens: 200,
        stop: vec![],
        stop_token_ids: vec![END],
        priority: 5,
        deadline_unix_ms: None,
        stream: true,
        tenant: String::new(),
        metadata_json: Some(r#"{"a":1}"#.into()),
        preprocess_ms: 1.5,
    }
}

/// What a subscriber got.
#[derive(Debug)]
pub struct Output {
    pub claims: usize,
    pub deltas: usize,
    pub text: String,
    pub token_ids: Vec<u32>,
    pub last: Final,
}

impl Output {
    /// Puts chunks together and proves that they are gapless and end in one final.
    fn of(chunks: Vec<OutputChunk>) -> Self {
        let (mut claims, mut deltas, mut text, mut token_ids, mut finals) = (0, 0, String::new(), vec![], vec![]);
        for chunk in chunks {
            assert!(finals.is_empty(), "{chunk:?} behind the final");
            assert_eq!(chunk.index, token_ids.len() as u64, "{chunk:?}");
            match chunk.chunk {
                Chunk::Claim { .. } => claims += 1,
                Chunk::Delta { token_ids: new, text: more, .. } => {
                    deltas += 1;
                    token_ids.extend(new);
                    text.push_str(&more);
                }
                Chunk::Final(last) => finals.push(*last),
            }
        }
        Self { claims, deltas, text, token_ids, last: finals.pop().expect("a final") }
    }
}
