//! The emitter against decoding everything at once, on the demo checkpoint's tokenizer.

use std::path::Path;
use std::sync::{Arc, LazyLock};

use millrace_protocol::ready::Shown;
use proptest::prelude::*;
use tokenizers::Tokenizer;

use super::*;
use crate::error::SchedulerError;

fn model_dir() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/demo/model"))
}

static VOCABULARY: LazyLock<Arc<Vocabulary>> = LazyLock::new(|| Arc::new(Vocabulary::load(model_dir()).unwrap()));
static TOKENIZER: LazyLock<Tokenizer> =
    LazyLock::new(|| Tokenizer::from_file(model_dir().join("tokenizer.json")).unwrap());

fn tokens(text: &str) -> Vec<u32> {
    TOKENIZER.encode(text, false).unwrap().get_ids().to_vec()
}

fn fresh(stops: &[&str]) -> Emitter {
    let stops = stops.iter().map(|stop| (*stop).to_owned()).collect();
    Emitter::resume(Arc::clone(&VOCABULARY), stops, &Shown::default()).unwrap().0
}

/// Text and stop text of a whole answer.
fn run(emitter: &mut Emitter, tokens: &[u32]) -> (String, Option<String>) {
    for token in tokens {
        if let Some(stop) = emitter.push(*token, None).unwrap() {
            return (emitter.text().to_owned(), Some(stop));
        }
    }
    let stop = emitter.finish().unwrap();
    (emitter.text().to_owned(), stop)
}

#[test]
fn special_tokens_are_skipped_and_added_ones_are_not() {
    let ids = [tokens("a"), vec![1000, 1012], tokens(" b"), vec![998]].concat();
    assert_eq!(run(&mut fresh(&[]), &ids).0, "a<tool_call> b");
}

#[test]
fn half_a_character_is_never_shown() {
    let ids = tokens("x😀é漢");
    assert!(ids.len() > 4, "the demo tokenizer splits these characters");
    let mut emitter = fresh(&[]);
    for id in ids {
        emitter.push(id, None).unwrap();
        assert!(!emitter.text().contains('\u{FFFD}') && "x😀é漢".starts_with(emitter.text()));
    }
    assert_eq!(emitter.text(), "x😀é漢");
}

#[test]
fn an_answer_cut_inside_a_character_ends_as_a_whole_decoding_does() {
    let ids = tokens("ab😀");
    let cut = &ids[..ids.len() - 1];
    let whole = VOCABULARY.decode(cut).unwrap();
    assert!(whole.ends_with('\u{FFFD}'));
    assert_eq!(run(&mut fresh(&[]), cut).0, whole);
}

#[test]
fn a_stop_text_across_tokens_is_not_part_of_the_answer() {
    let ids = tokens("one two STOP three");
    let (text, stop) = run(&mut fresh(&[" STOP"]), &ids);
    assert_eq!((text.as_str(), stop.as_deref()), ("one two", Some(" STOP")));
}

#[test]
fn text_that_is_not_that_of_its_tokens_is_not_continued() {
    let shown = Shown { last_seq: 4, token_ids: tokens("hello"), text: "help".into() };
    let error = Emitter::resume(Arc::clone(&VOCABULARY), vec![], &shown).unwrap_err();
    assert!(matches!(error, SchedulerError::Continuity));
}

#[test]
fn an_end_that_was_shown_before_is_not_shown_again() {
    let ids = tokens("go EN");
    let shown = Shown { last_seq: 4, token_ids: ids, text: "go EN".into() };
    let (mut emitter, stop) = Emitter::resume(Arc::clone(&VOCABULARY), vec!["END".into()], &shown).unwrap();
    assert_eq!(stop, None);
    assert_eq!(emitter.finish().unwrap(), None);
    assert_eq!((emitter.take(), emitter.text()), (None, "go EN"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn any_text_comes_out_whole(text in "\\PC{0,40}") {
        let ids = tokens(&text);
        prop_assert_eq!(run(&mut fresh(&[]), &ids).0, VOCABULARY.decode(&ids).unwrap());
    }

    #[test]
    fn any_tokens_come_out_as_decoded_at_once(ids in prop::collection::vec(0_u32..1024, 0..12)) {
        prop_assert_eq!(run(&mut fresh(&[]), &ids).0, VOCABULARY.decode(&ids).unwrap());
    }

    #[test]
    fn a_resumed_answer_equals_an_uninterrupted_one(text in "[a-c é😀漢]{0,16}", stop in "[a-c é😀]{1,3}") {
        let ids = tokens(&text);
        let stops = [stop.as_str()];
        let mut whole = fresh(&stops);
        let expected = run(&mut whole, &ids);
        for cut in 0..=whole.token_ids().len() {
            let mut first = fresh(&stops);
            let mut shown = Shown::default();
            for id in &ids[..cut] {
                first.push(*id, None).unwrap();
                let delta = first.take().unwrap();
                shown.token_ids.extend(delta.token_ids);
                shown.text.push_str(&delta.text);
            }
            let (mut second, ended) = Emitter::resume(Arc::clone(&VOCABULARY), vec![stop.clone()], &shown).unwrap();
            let (text, stopped) = match ended {
                Some(stop) => (second.text().to_owned(), Some(stop)),
                None => run(&mut second, &ids[cut..]),
            };
            let new = second.take().unwrap_or_default();
            prop_assert_eq!(shown.text + &new.text, text.clone());
            prop_assert_eq!((text, stopped), expected.clone());
        }
    }
}
