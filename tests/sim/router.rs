//! How preprocess actors choose a scheduler: the one with the most room by its last beacon, a place taken for each offer.
//! One table for each preprocess actor. Same rule as `preprocess/src/actor/routing.rs`, kept sorted: a thousand engines.

use std::collections::BTreeSet;

use fastrand::Rng;

/// One preprocess actor's view of all schedulers.
#[derive(Debug, Default)]
pub struct Router {
    heard: Vec<(usize, usize)>,
    order: BTreeSet<(usize, usize, usize)>,
}

impl Router {
    /// Nothing heard of any of `engines` schedulers.
    pub fn new(engines: usize) -> Self {
        Self { heard: vec![(0, 0); engines], order: BTreeSet::new() }
    }

    /// Notes a beacon.
    pub fn hear(&mut self, engine: usize, free_jobs: usize, free_blocks: usize) {
        let (old_jobs, old_blocks) = std::mem::replace(&mut self.heard[engine], (free_jobs, free_blocks));
        self.order.remove(&(old_jobs, old_blocks, engine));
        if free_jobs > 0 {
            self.order.insert((free_jobs, free_blocks, engine));
        }
    }

    /// The roomiest one, one of its places taken.
    pub fn choose(&mut self) -> Option<usize> {
        let &(free_jobs, free_blocks, engine) = self.order.last()?;
        self.hear(engine, free_jobs - 1, free_blocks);
        Some(engine)
    }

    /// The roomier of two drawn by lot, so that actors with the same beacons do not all run to the same place.
    pub fn choose_of_two(&mut self, rng: &mut Rng) -> Option<usize> {
        let drawn = [(); 2].map(|()| rng.usize(0..self.heard.len()));
        let engine = drawn.into_iter().max_by_key(|engine| self.heard[*engine])?;
        let (free_jobs, free_blocks) = self.heard[engine];
        if free_jobs == 0 {
            return self.choose();
        }
        self.hear(engine, free_jobs - 1, free_blocks);
        Some(engine)
    }

    /// It was busy: no room until its next beacon.
    pub fn skip(&mut self, engine: usize) {
        self.hear(engine, 0, 0);
    }
}
