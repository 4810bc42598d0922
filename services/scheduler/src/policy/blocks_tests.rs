//! Exact cases of the block pool, and a property against a plain model of it.

use proptest::prelude::*;

use super::*;
use crate::policy::prefix::HashChain;

fn hashes(count: usize) -> Vec<BlockHash> {
    let tokens: Vec<u32> = (0..count as u32).collect();
    let mut chain = HashChain::new("w", "t");
    chain.extend(&tokens, &[], 1);
    chain.hashes().to_vec()
}

#[test]
fn the_longest_idle_content_is_evicted_first() {
    let keys = hashes(3);
    let mut pool = BlockPool::new(3);
    let mut table: Vec<Block> = (0..3).map(|_| pool.allocate().unwrap()).collect();
    assert_eq!(pool.allocate(), None);
    for (block, key) in table.iter().zip(&keys) {
        pool.register(block, *key);
    }
    pool.release_table(&mut table);
    assert_eq!((pool.available(), pool.cached()), (3, 3));
    let fresh = pool.allocate().unwrap();
    // A table gives back its end first: what is lost is the end of the prompt, not its shared beginning.
    assert_eq!(pool.peek(&keys[2]), None);
    let found = pool.lookup(&keys[0]).unwrap();
    assert_eq!((pool.peek(&keys[0]), pool.peek(&keys[1])), (Some(Held::Referenced), Some(Held::Idle)));
    assert_eq!((pool.available(), pool.evictions()), (1, 1));
    pool.check([&fresh, &found]).unwrap();
    pool.release(fresh);
    pool.release(found);
    pool.check([]).unwrap();
}

#[test]
fn content_has_one_home_and_can_be_forgotten() {
    let keys = hashes(1);
    let mut pool = BlockPool::new(2);
    let (one, two) = (pool.allocate().unwrap(), pool.allocate().unwrap());
    pool.register(&one, keys[0]);
    pool.register(&two, keys[0]);
    let again = pool.lookup(&keys[0]).unwrap();
    assert_eq!(again.id(), one.id());
    assert!(pool.is_shared(&one) && !pool.is_shared(&two));
    pool.release(again);
    pool.unregister(&one);
    assert_eq!(pool.lookup(&keys[0]), None);
    pool.check([&one, &two]).unwrap();
}

#[test]
fn a_lost_reference_is_found() {
    let mut pool = BlockPool::new(2);
    let lost = pool.allocate().unwrap();
    drop(lost);
    assert!(pool.check([]).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]
    #[test]
    fn the_books_balance_after_any_history(actions in prop::collection::vec((0_u8..5, 0_usize..8), 0..200)) {
        let keys = hashes(8);
        let mut pool = BlockPool::new(6);
        let mut held: Vec<Block> = Vec::new();
        for (action, number) in actions {
            match action {
                0 => match pool.allocate() {
                    Some(block) => held.push(block),
                    None => prop_assert_eq!(pool.available(), 0),
                },
                1 => held.extend(pool.lookup(&keys[number])),
                2 if !held.is_empty() => pool.register(&held[number % held.len()], keys[number]),
                3 if !held.is_empty() => {
                    let block = held.swap_remove(number % held.len());
                    pool.release(block);
                }
                4 if !held.is_empty() => pool.unregister(&held[number % held.len()]),
                _ => {}
            }
            prop_assert_eq!(pool.check(&held), Ok(()));
            let distinct: std::collections::HashSet<_> = held.iter().map(Block::id).collect();
            prop_assert_eq!(pool.available(), 6 - distinct.len());
        }
    }
}
