//! Stop texts: finds the first one to complete, and holds back text that may become one. Must not know tokens.
//!
//! The result depends on the text alone, not on the pieces in which it comes: the stop text that ends first counts, and of
//! several that end there the longest.

/// Watches one answer for its stop texts.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    stops: Vec<String>,
    held: String,
}

/// What can be shown after a piece of text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Passed {
    /// Text that belongs to no stop text for certain.
    pub text: String,
    /// The stop text that ended the answer.
    pub stop: Option<String>,
}

impl StopMatcher {
    /// A matcher for these texts; empty ones never match.
    pub fn new(stops: Vec<String>) -> Self {
        Self { stops: stops.into_iter().filter(|stop| !stop.is_empty()).collect(), held: String::new() }
    }

    /// Takes the next piece of text. After a stop text nothing more may come.
    pub fn push(&mut self, piece: &str) -> Passed {
        if self.stops.is_empty() {
            return Passed { text: piece.to_owned(), stop: None };
        }
        self.held.push_str(piece);
        if let Some((start, stop)) = self.first_match() {
            let text = self.held[..start].to_owned();
            self.held.clear();
            return Passed { text, stop: Some(stop) };
        }
        let keep_from = self.held.len() - self.longest_beginning();
        let rest = self.held.split_off(keep_from);
        Passed { text: std::mem::replace(&mut self.held, rest), stop: None }
    }

    /// What is held back: it did not become a stop text.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// (start, stop text) of the match that ends first; of those the longest.
    fn first_match(&self) -> Option<(usize, String)> {
        let found = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str()).map(|start| (start, stop)));
        let (start, stop) = found.min_by_key(|(start, stop)| (start + stop.len(), *start))?;
        Some((start, stop.clone()))
    }

    /// Bytes of the longest end of the held text that begins a stop text.
    fn longest_beginning(&self) -> usize {
        let of = |stop: &String| {
            let most = self.held.len().min(stop.len() - 1);
            let fits = |n: &usize| self.held.as_bytes().ends_with(&stop.as_bytes()[..*n]) && stop.is_char_boundary(*n);
            (1..=most).rev().find(fits).unwrap_or(0)
        };
        self.stops.iter().map(of).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What characters one at a time give: the definition.
    fn reference(stops: &[&str], text: &str) -> (String, Option<String>) {
        let mut seen = String::new();
        for c in text.chars() {
            seen.push(c);
            if let Some(stop) = stops.iter().filter(|stop| seen.ends_with(**stop)).max_by_key(|stop| stop.len()) {
                seen.truncate(seen.len() - stop.len());
                return (seen, Some((*stop).to_owned()));
            }
        }
        (seen, None)
    }

    fn in_pieces(stops: &[&str], text: &str, cuts: &[usize]) -> (String, Option<String>) {
        let mut matcher = StopMatcher::new(stops.iter().map(|stop| (*stop).to_owned()).collect());
        let mut shown = String::new();
        let chars: Vec<char> = text.chars().collect();
        let mut rest = chars.as_slice();
        for cut in cuts.iter().copied().chain([usize::MAX]) {
            let (piece, after) = rest.split_at(cut.min(rest.len()));
            rest = after;
            let passed = matcher.push(&piece.iter().collect::<String>());
            shown.push_str(&passed.text);
            if passed.stop.is_some() {
                return (shown, passed.stop);
            }
        }
        shown.push_str(&matcher.finish());
        (shown, None)
    }

    #[test]
    fn exact_cases() {
        let push = |stops: &[&str], pieces: &[&str]| {
            let mut matcher = StopMatcher::new(stops.iter().map(|s| (*s).to_owned()).collect());
            pieces.iter().map(|piece| matcher.push(piece)).map(|p| (p.text, p.stop)).collect::<Vec<_>>()
        };
        let shown = |text: &str| (text.to_owned(), None);
        assert_eq!(push(&["END"], &["a E", "N", "x"]), [shown("a "), shown(""), shown("ENx")]);
        assert_eq!(push(&["END"], &["a E", "ND b"]), [shown("a "), (String::new(), Some("END".to_owned()))]);
        assert_eq!(push(&["bc", "abcd"], &["xabcd"]), [("xa".to_owned(), Some("bc".to_owned()))]);
        assert_eq!(push(&["é!"], &["é", "é!"])[1], ("é".to_owned(), Some("é!".to_owned())));
        assert_eq!(push(&[""], &["a"]), [shown("a")]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]
        #[test]
        fn the_pieces_do_not_matter(
            text in "[abé😀]{0,24}",
            stops in prop::collection::vec("[abé😀]{1,4}", 0..4),
            cuts in prop::collection::vec(0_usize..4, 0..24),
        ) {
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            prop_assert_eq!(in_pieces(&stops, &text, &cuts), reference(&stops, &text));
        }
    }
}
