//! Exact cases of swapping: when it pays, who gets pages, and that what comes back is what left.

use super::*;
use crate::policy::planner_tests::{answer, answer_of, drawn_answer, limits, plan, planner, run, submit};
use crate::policy::prefix::HashChain;
use crate::policy::scripted::{Scripted, job, spec};
use crate::policy::{Event, Events, Limits, NewSequence};

fn costs(swap_out_ns: u64, swap_in_ns: u64, host_blocks: u32) -> EngineCosts {
    EngineCosts { token_ns: 1_000, swap_out_ns, swap_in_ns, host_blocks }
}

fn chain(first: u32, blocks: u32) -> Vec<BlockHash> {
    let mut chain = HashChain::new("w", "t");
    chain.extend(&(first..first + 4 * blocks).collect::<Vec<_>>(), &[], 4);
    chain.hashes().to_vec()
}

#[test]
fn swapping_pays_below_the_time_of_computing_again() {
    // Blocks of 4 tokens at 1,000 ns each.
    for (out, back, host, cheaper) in [
        (2_000, 1_999, 1, true),
        (2_000, 2_000, 1, false),
        (3_999, 0, 1, true),
        (0, 4_000, 1, false),
        (1, 1, 0, false),
        (u64::MAX, 1, 1, false),
    ] {
        assert_eq!(is_cheaper(&costs(out, back, host), 4), cheaper, "{out} + {back} ns");
    }
    assert!(!is_cheaper(&EngineCosts { token_ns: 0, ..costs(0, 0, 9) }, 4), "not measured");
}

#[test]
fn pages_go_to_leading_blocks_and_come_back() {
    let mut swap = Swap::new(&costs(0, 0, 3), 4);
    let (a, b) = (chain(0, 2), chain(100, 2));
    assert_eq!((swap.promise(&a), swap.promise(&b)), (2, 1));
    assert_eq!(swap.promise(&a), 2, "what is promised already takes no page more");
    swap.check(a.iter().chain(&a).chain(&b[..1])).unwrap();
    assert!(swap.check(&a).is_err());
    swap.evicted(BlockId(7), &a[1]);
    swap.evicted(BlockId(8), &b[1]);
    swap.evicted(BlockId(9), &b[0]);
    swap.evicted(BlockId(6), &a[1]);
    assert_eq!(
        swap.take_copies(),
        [BlockCopy::Out { block: BlockId(7), page: 0 }, BlockCopy::Out { block: BlockId(9), page: 1 },]
    );
    assert!(swap.restore(&a[1], BlockId(3)) && !swap.restore(&a[0], BlockId(4)));
    assert_eq!(swap.take_copies(), [BlockCopy::In { page: 0, block: BlockId(3) }]);
    swap.release(&a);
    assert!(swap.holds(&a[1]), "the other one still waits for it");
    swap.release(&a);
    assert!(!swap.holds(&a[1]));
    swap.release(&b[..1]);
    swap.check([]).unwrap();
    assert_eq!(swap.swapped(), (2, 1));
}

/// Runs a humble job that an urgent one pushes out of the pool; how its copies and its second admission looked.
fn pushed_out(costs: &EngineCosts) -> ([usize; 2], usize) {
    let mut planner = planner(10, 4, Limits { watermark_blocks: 0, ..limits(64) });
    planner.swap_by(costs);
    let mut executor = Scripted::new(spec(10, 4));
    let humble = submit(&mut planner, NewSequence { priority: 1, ..job("humble", 0..13, 20) });
    let mut events = Events::new();
    for _ in 0..4 {
        executor.send(plan(&mut planner));
        events.extend(answer(&mut planner, &mut executor));
    }
    let urgent = submit(&mut planner, NewSequence { priority: 9, ..job("urgent", 100..130, 8) });
    events.extend(run(&mut planner, &mut executor));
    for (id, name, length) in [(humble, "humble", 20), (urgent, "urgent", 8)] {
        assert_eq!(answer_of(id, &events), drawn_answer(name, length), "{name}");
    }
    let again = events.iter().find_map(|(_, event)| match event {
        Event::Admitted { cached_tokens, again: true } => Some(*cached_tokens),
        _ => None,
    });
    let counts = planner.counts();
    assert_eq!([counts.swapped_out as usize, counts.swapped_in as usize], executor.copied);
    (executor.copied, again.expect("the humble job was preempted"))
}

#[test]
fn a_preempted_sequence_gets_its_blocks_back_from_host_memory() {
    // 16 tokens were computed when it lost its slot: four blocks. The urgent job's ten leave none of them in the pool.
    assert_eq!(pushed_out(&costs(2_000, 1_999, 8)), ([4, 4], 16));
    assert_eq!(pushed_out(&costs(2_000, 1_999, 2)), ([2, 2], 8), "two pages hold the first two");
    assert_eq!(pushed_out(&costs(2_000, 2_000, 8)), ([0, 0], 0), "computing again costs the same");
}

#[test]
fn a_cancelled_job_frees_its_pages_while_it_waits() {
    let mut planner = planner(10, 4, Limits { watermark_blocks: 0, ..limits(64) });
    planner.swap_by(&costs(0, 0, 8));
    let mut executor = Scripted::new(spec(10, 4));
    let humble = submit(&mut planner, NewSequence { priority: 1, ..job("humble", 0..13, 20) });
    executor.send(plan(&mut planner));
    answer(&mut planner, &mut executor);
    submit(&mut planner, NewSequence { priority: 9, ..job("urgent", 100..130, 8) });
    executor.send(plan(&mut planner));
    assert_eq!(planner.sequence(humble).map(|sequence| sequence.promised), Some(3));
    assert!(planner.remove(humble).is_some());
    planner.check().unwrap();
    run(&mut planner, &mut executor);
    assert_eq!(planner.counts().free_blocks, 10);
}
