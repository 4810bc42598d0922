//! Budgets, checksums, leases and faults of the page store, on real files.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use millrace_protocol::{ActorId, JobId, PageDtype, PageRef};
use millrace_runtime::clock::Clock;
use proptest::prelude::*;
use tempfile::TempDir;

use crate::{PageStore, PagerError, PagerLimits};

const LEASE: Duration = Duration::from_secs(10);

fn open(root: &Path, ram_bytes: u64, disk_bytes: u64) -> PageStore {
    let limits = PagerLimits { ram_bytes, disk_bytes, spill_root: root.to_path_buf(), lease: LEASE };
    PageStore::open(ActorId::new("node-1").unwrap(), limits).unwrap()
}

fn start() -> Instant {
    Clock::manual(0).0.now()
}

fn job(name: impl std::fmt::Display) -> JobId {
    JobId::new(format!("job-{name}")).unwrap()
}

fn content(seed: u64, length: usize) -> Bytes {
    (0..length as u64).map(|i| (i.wrapping_mul(0x9E37_79B9).wrapping_add(seed * 77) >> 8) as u8).collect()
}

fn put(store: &PageStore, owner: &JobId, bytes: &Bytes, now: Instant) -> Result<PageRef, PagerError> {
    store.put(owner, PageDtype::Bf16, &[bytes.len() as u32 / 2], bytes.clone(), now)
}

fn files_in(folder: &Path) -> Vec<u64> {
    let pages = fs::read_dir(folder).unwrap().filter_map(|entry| {
        let path = entry.unwrap().path();
        (path.extension()? == "page").then(|| fs::metadata(&path).unwrap().len())
    });
    pages.collect()
}

#[test]
fn a_reference_says_what_was_stored() {
    let root = TempDir::new().unwrap();
    let store = open(root.path(), 1000, 0);
    let bytes = content(1, 48);
    let page = store.put(&job(1), PageDtype::F32, &[3, 4], bytes.clone(), start()).unwrap();
    assert_eq!((page.bytes, page.shape.as_slice(), page.node.as_str()), (48, &[3, 4][..], "node-1"));
    assert_eq!(page.hash, blake3::hash(&bytes).as_bytes()[..16]);
    assert_eq!(store.get(page.page).unwrap(), bytes);
    assert_eq!(store.read(page.page, 40, 100).unwrap(), bytes.slice(40..));
    assert_eq!(store.read(page.page, 4, 8).unwrap(), bytes.slice(4..12));
    assert!(store.read(page.page, u64::MAX, 8).unwrap().is_empty());
}

#[test]
fn shape_and_length_must_agree() {
    let root = TempDir::new().unwrap();
    let store = open(root.path(), 1000, 0);
    for shape in [&[3u32, 5][..], &[], &[u32::MAX, u32::MAX, u32::MAX]] {
        let refused = store.put(&job(1), PageDtype::F32, shape, content(1, 48), start());
        assert!(matches!(refused, Err(PagerError::Shape { actual: 48, .. })), "{shape:?}");
    }
    assert_eq!(store.counters().pages, 0);
}

#[test]
fn the_page_unused_longest_is_spilled_first() {
    let root = TempDir::new().unwrap();
    let store = open(root.path(), 200, 1000);
    let pages: Vec<_> = (0..2).map(|i| put(&store, &job(i), &content(i, 100), start()).unwrap()).collect();
    store.get(pages[0].page).unwrap();
    put(&store, &job(2), &content(2, 100), start()).unwrap();
    assert!(store.spill_file(pages[1].page).exists());
    assert!(!store.spill_file(pages[0].page).exists());
    let hits = store.counters().hits;
    store.get(pages[0].page).unwrap();
    assert_eq!((store.counters().hits, store.counters().misses), (hits + 1, 0));
    assert_eq!(store.get(pages[1].page).unwrap(), content(1, 100));
    assert_eq!(store.counters().misses, 1);
    // It is back in RAM now and served from there.
    store.get(pages[1].page).unwrap();
    assert_eq!(store.counters().misses, 1);
}

#[test]
fn a_returned_page_is_evicted_without_writing_again() {
    let root = TempDir::new().unwrap();
    let store = open(root.path(), 100, 1000);
    let a = put(&store, &job(0), &content(0, 100), start()).unwrap();
    let b = put(&store, &job(1), &content(1, 100), start()).unwrap();
    for _ in 0..3 {
        assert_eq!(store.get(a.page).unwrap(), content(0, 100));
        assert_eq!(store.get(b.page).unwrap(), content(1, 100));
    }
    assert_eq!(store.counters().spills, 2);
}

#[test]
fn full_tiers_refuse_and_change_nothing() {
    let root = TempDir::new().unwrap();
    let store = open(root.path(), 100, 150);
    let a = put(&store, &job(0), &content(0, 100), start()).unwrap();
    let b = put(&store, &job(1), &content(1, 100), start()).unwrap();
    let refused = put(&store, &job(2), &content(2, 100), start());
    assert!(
        matches!(refused, Err(PagerError::OverBudget { page_bytes: 100, ram_free: 0, disk_free: 50 })),
        "{refused:?}"
    );
    assert_eq!(store.counters().jobs, 2);
    assert_eq!(store.get(a.page).unwrap(), content(0, 100));
    assert_eq!(store.get(b.page).unwrap(), content(1, 100));
    assert_eq!(store.release(&job(0)), 1);
    let c = put(&store, &job(2), &content(2, 100), start()).unwrap();
    assert!(c.page > b.page, "numbers are never used twice");
}

#[test]
fn a_page_larger_than_ram_lives_on_disk() {
    let root = TempDir::new().unwrap();
    let store = open(root.path(), 10, 1000);
    let page = put(&store, &job(0), &content(0, 100), start()).unwrap();
    assert_eq!(store.get(page.page).unwrap(), content(0, 100));
    assert_eq!(store.read(page.page, 90, 50).unwrap(), content(0, 100).slice(90..));
    assert_eq!(store.counters().ram_bytes, 0);
}

#[test]
fn leases_run_out_unless_renewed() {
    let root = TempDir::new().unwrap();
    let store = open(root.path(), 100, 1000);
    let now = start();
    let kept = put(&store, &job("kept"), &content(0, 60), now).unwrap();
    let lost = put(&store, &job("lost"), &content(1, 60), now).unwrap();
    assert_eq!(store.renew(&[job("kept"), job("unknown")], now + LEASE / 2), 1);
    assert!(store.expire(now + LEASE - Duration::from_millis(1)).is_empty());
    assert_eq!(store.expire(now + LEASE), vec![job("lost")]);
    assert!(matches!(store.get(lost.page), Err(PagerError::Missing(page)) if page == lost.page));
    assert_eq!(store.get(kept.page).unwrap(), content(0, 60));
    assert_eq!(store.expire(now + LEASE * 2), vec![job("kept")]);
    let counters = store.counters();
    assert_eq!((counters.ram_bytes, counters.disk_bytes, counters.pages, counters.expired), (0, 0, 0, 2));
    assert!(files_in(&store.spill_folder()).is_empty());
}

#[test]
fn a_changed_or_shortened_file_is_corrupt() {
    let root = TempDir::new().unwrap();
    let store = open(root.path(), 10, 1000);
    for (index, damage) in
        [|b: &mut Vec<u8>| b[50] ^= 1, |b: &mut Vec<u8>| b.truncate(99), |b: &mut Vec<u8>| b.push(0)].iter().enumerate()
    {
        let page = put(&store, &job(index), &content(index as u64, 100), start()).unwrap();
        let path = store.spill_file(page.page);
        let mut bytes = fs::read(&path).unwrap();
        damage(&mut bytes);
        fs::write(&path, bytes).unwrap();
        assert!(matches!(store.get(page.page), Err(PagerError::Corrupt(p)) if p == page.page));
        assert!(matches!(store.read(page.page, 0, 1), Err(PagerError::Corrupt(_))));
    }
    assert_eq!(store.counters().corrupt, 6);
}

#[test]
fn a_lost_folder_is_an_io_error_and_ram_goes_on() {
    let root = TempDir::new().unwrap();
    let store = open(root.path(), 100, 1000);
    let spilled = put(&store, &job(0), &content(0, 100), start()).unwrap();
    let in_ram = put(&store, &job(1), &content(1, 100), start()).unwrap();
    fs::remove_dir_all(store.spill_folder()).unwrap();
    assert!(matches!(store.get(spilled.page), Err(PagerError::Io { .. })));
    assert!(matches!(put(&store, &job(2), &content(2, 100), start()), Err(PagerError::Io { .. })));
    assert_eq!(store.get(in_ram.page).unwrap(), content(1, 100));
    assert_eq!(store.release(&job(0)) + store.release(&job(1)), 2);
    assert_eq!((store.counters().ram_bytes, store.counters().disk_bytes), (0, 0));
}

#[test]
fn folders_of_the_dead_go_and_those_of_the_living_stay() {
    let root = TempDir::new().unwrap();
    let living = open(root.path(), 10, 1000);
    let page = put(&living, &job(0), &content(0, 100), start()).unwrap();
    let dead = root.path().join("pages-dead");
    fs::create_dir(&dead).unwrap();
    fs::write(dead.join("owner.lock"), "").unwrap();
    fs::write(dead.join("7.page"), "left behind").unwrap();
    let foreign = root.path().join("not-ours");
    fs::create_dir(&foreign).unwrap();
    let second = open(root.path(), 10, 1000);
    assert!(!dead.exists());
    assert!(foreign.exists());
    assert_eq!(living.get(page.page).unwrap(), content(0, 100));
    let folder = second.spill_folder();
    drop(second);
    assert!(!folder.exists());
    assert!(living.spill_folder().exists());
}

#[test]
fn threads_see_whole_pages_while_others_evict() {
    let root = TempDir::new().unwrap();
    let store = Arc::new(open(root.path(), 3_000, 12_000));
    let now = start();
    let pages: Vec<_> = (0..10).map(|i| put(&store, &job(i), &content(i, 1000), now).unwrap()).collect();
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let (store, pages) = (&store, &pages);
            scope.spawn(move || {
                for round in 0..200u64 {
                    let index = (round * 7 + thread * 3) % 10;
                    assert_eq!(store.get(pages[index as usize].page).unwrap(), content(index, 1000));
                }
            });
        }
    });
    assert!(store.counters().ram_bytes <= 3_000);
}

#[derive(Debug, Clone)]
enum Step {
    Put { owner: u8, length: usize },
    Get { which: usize },
    Release { owner: u8 },
    Renew { owner: u8 },
    Wait { secs: u64 },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0u8..6, 0usize..150).prop_map(|(owner, half)| Step::Put { owner, length: half * 2 }),
        4 => (0usize..64).prop_map(|which| Step::Get { which }),
        1 => (0u8..6).prop_map(|owner| Step::Release { owner }),
        1 => (0u8..6).prop_map(|owner| Step::Renew { owner }),
        1 => (1u64..6).prop_map(|secs| Step::Wait { secs }),
    ];
    prop::collection::vec(step, 1..80)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn budgets_hold_bytes_return_and_nothing_leaks(steps in steps(), ram in 0u64..800, disk in 0u64..1200) {
        let root = TempDir::new().unwrap();
        let store = open(root.path(), ram, disk);
        let mut now = start();
        let mut model: HashMap<u64, (u8, Bytes)> = HashMap::new();
        let mut until: HashMap<u8, Instant> = HashMap::new();
        for (index, step) in steps.into_iter().enumerate() {
            match step {
                Step::Put { owner, length } => {
                    let bytes = content(index as u64, length);
                    match put(&store, &job(owner), &bytes, now) {
                        Ok(page) => {
                            prop_assert!(model.insert(page.page, (owner, bytes)).is_none(), "number used twice");
                            until.insert(owner, now + LEASE);
                        }
                        Err(error) => prop_assert!(matches!(error, PagerError::OverBudget { .. }), "{error}"),
                    }
                }
                Step::Get { which } => {
                    let mut pages: Vec<_> = model.keys().copied().collect();
                    pages.sort_unstable();
                    if let Some(page) = pages.get(which % pages.len().max(1)) {
                        prop_assert_eq!(&store.get(*page).unwrap(), &model[page].1);
                    }
                }
                Step::Release { owner } => {
                    let held = model.values().filter(|(o, _)| *o == owner).count();
                    prop_assert_eq!(store.release(&job(owner)), held);
                    model.retain(|_, (o, _)| *o != owner);
                    until.remove(&owner);
                }
                Step::Renew { owner } => {
                    let known = store.renew(&[job(owner)], now);
                    prop_assert_eq!(known == 1, until.contains_key(&owner));
                    until.entry(owner).and_modify(|u| *u = now + LEASE);
                }
                Step::Wait { secs } => {
                    now += Duration::from_secs(secs);
                    store.expire(now);
                    until.retain(|_, u| *u > now);
                    model.retain(|_, (o, _)| until.contains_key(o));
                }
            }
            let counters = store.counters();
            prop_assert!(counters.ram_bytes <= ram && counters.disk_bytes <= disk);
            prop_assert_eq!(counters.pages, model.len() as u64);
            prop_assert_eq!(files_in(&store.spill_folder()).iter().sum::<u64>(), counters.disk_bytes);
        }
        for (page, (_, bytes)) in &model {
            prop_assert_eq!(&store.get(*page).unwrap(), bytes);
        }
        for owner in 0..6 {
            store.release(&job(owner));
        }
        let counters = store.counters();
        prop_assert_eq!((counters.ram_bytes, counters.disk_bytes, counters.pages, counters.jobs), (0, 0, 0, 0));
        prop_assert!(files_in(&store.spill_folder()).is_empty());
    }
}
