//! What a job's output subject already says when one of its deliveries arrives: pure reading of stored chunks.

use millrace_protocol::ready::Shown;
use millrace_protocol::{Chunk, OutputChunk};

/// The meaning of a job's stored output for a delivery.
#[derive(Debug, Clone, PartialEq)]
pub enum History {
    /// The job goes on behind what was shown (nothing, for a new one).
    Continue(Shown),
    /// It ended; the delivery is a leftover.
    Ended,
    /// A second submission under the same id: the first one's message answers for the job.
    SecondSubmission,
}

/// Reads the stored chunks, in order, for the delivery of the work-queue message `job_seq`.
pub fn read(chunks: &[(u64, OutputChunk)], job_seq: u64) -> History {
    let mut shown = Shown::default();
    let mut owner_seq = job_seq;
    for (seq, chunk) in chunks {
        shown.last_seq = *seq;
        match &chunk.chunk {
            Chunk::Claim { job_seq, .. } => owner_seq = *job_seq,
            Chunk::Delta { token_ids, text, .. } => {
                shown.token_ids.extend_from_slice(token_ids);
                shown.text.push_str(text);
            }
            Chunk::Final(_) => return History::Ended,
        }
    }
    if owner_seq == job_seq { History::Continue(shown) } else { History::SecondSubmission }
}

#[cfg(test)]
mod tests {
    use millrace_protocol::{ActorId, Final, JobId, Status};

    use super::*;

    fn chunks(list: Vec<Chunk>) -> Vec<(u64, OutputChunk)> {
        let job = JobId::new("a").unwrap();
        let number = |(i, chunk)| (10 * (i as u64 + 1), OutputChunk { v: 1, job: job.clone(), index: 0, chunk });
        list.into_iter().enumerate().map(number).collect()
    }

    fn claim(job_seq: u64) -> Chunk {
        Chunk::Claim { owner: ActorId::new("s").unwrap(), job_seq, attempt: 1 }
    }

    fn delta(token: u32, text: &str) -> Chunk {
        Chunk::Delta { token_ids: vec![token], text: text.into(), logprobs: vec![] }
    }

    fn last() -> Chunk {
        Chunk::Final(Box::new(Final::bare(Status::Done)))
    }

    #[test]
    fn a_new_job_starts_from_nothing() {
        assert_eq!(read(&[], 7), History::Continue(Shown::default()));
    }

    #[test]
    fn a_redelivery_goes_on_behind_everything_shown_by_all_owners() {
        let stored = chunks(vec![claim(7), delta(1, "a "), claim(7), delta(2, "red")]);
        let expected = Shown { last_seq: 40, token_ids: vec![1, 2], text: "a red".into() };
        assert_eq!(read(&stored, 7), History::Continue(expected));
    }

    #[test]
    fn an_ended_job_stays_ended_and_a_second_submission_is_told_apart() {
        assert_eq!(read(&chunks(vec![claim(7), last()]), 7), History::Ended);
        assert_eq!(read(&chunks(vec![last()]), 8), History::Ended);
        assert_eq!(read(&chunks(vec![claim(7), delta(1, "a")]), 8), History::SecondSubmission);
    }
}
