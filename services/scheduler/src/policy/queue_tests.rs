//! Exact tables of the queue's order.

use super::*;

fn at(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

struct Bench {
    queue: WaitingQueue,
    next: u64,
}

impl Bench {
    fn new(ageing: u64) -> Self {
        Self { queue: WaitingQueue::new(at(ageing)), next: 0 }
    }

    fn push(&mut self, tenant: &str, priority: u8, arrival: u64) -> SeqId {
        self.next += 1;
        let id = SeqId { index: self.next as u32, unique: self.next };
        let rank = Rank { depth: depth(priority), arrival: at(arrival), id: self.next };
        let tenant = self.queue.enter(tenant);
        self.queue.push(id, tenant, rank, at(arrival), Duration::ZERO);
        id
    }

    fn drain(&mut self) -> Vec<u64> {
        let mut order = Vec::new();
        while let Some(id) = self.queue.head() {
            self.queue.remove(id);
            order.push(id.unique);
        }
        assert!(self.queue.is_empty() && self.queue.next_rise_at().is_none());
        order
    }
}

#[test]
fn priority_then_arrival() {
    let mut bench = Bench::new(0);
    for (priority, arrival) in [(0, 1), (9, 5), (5, 2), (9, 3), (5, 2)] {
        bench.push("", priority, arrival);
    }
    assert_eq!(bench.drain(), [4, 2, 3, 5, 1]);
}

#[test]
fn waiting_raises_a_level_each_time_and_stops_at_the_top() {
    let mut bench = Bench::new(10);
    let old = bench.push("", 0, 0);
    bench.push("", 3, 29);
    bench.queue.age(at(29));
    assert_eq!(bench.queue.head().unwrap().unique, 2);
    bench.queue.age(at(30));
    assert_eq!(bench.queue.rank(old).unwrap().depth, depth(3));
    assert_eq!(bench.queue.head(), Some(old), "level 3 as well, and older");
    bench.queue.age(at(1_000));
    assert_eq!(bench.queue.rank(old).unwrap().depth, 0);
    assert_eq!(bench.drain(), [1, 2]);
}

#[test]
fn an_earlier_wait_counts() {
    let mut queue = WaitingQueue::new(at(10));
    let tenant = queue.enter("");
    let id = SeqId { index: 0, unique: 1 };
    let rank = Rank { depth: 9, arrival: at(0), id: 1 };
    queue.push(id, tenant, rank, at(100), at(7));
    assert_eq!(queue.next_rise_at(), Some(at(103)));
}

#[test]
fn within_a_level_who_had_least_goes_first() {
    let mut bench = Bench::new(0);
    for arrival in 0..3 {
        bench.push("greedy", 5, arrival);
    }
    bench.push("modest", 5, 9);
    let (greedy, modest) = (bench.queue.enter("greedy"), bench.queue.enter("modest"));
    assert_eq!(bench.queue.head().unwrap().unique, 1, "equal so far: the oldest");
    bench.queue.charge(greedy, 10);
    assert_eq!(bench.queue.head().unwrap().unique, 4);
    bench.queue.charge(modest, 11);
    assert_eq!(bench.drain(), [1, 2, 3, 4]);
}
