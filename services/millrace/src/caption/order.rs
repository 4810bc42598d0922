//! Windows run side by side and end in any order; people read them in the file's order. This holds a result back
//! until everything before it is there.

use std::collections::BTreeMap;

/// Releases numbered items in order, from 0.
#[derive(Debug)]
pub struct InOrder<T> {
    next: usize,
    waiting: BTreeMap<usize, T>,
}

impl<T> Default for InOrder<T> {
    fn default() -> Self {
        Self { next: 0, waiting: BTreeMap::new() }
    }
}

impl<T> InOrder<T> {
    /// Takes item `number` and returns every item that is now due, in order. A number that was already released is
    /// returned at once.
    pub fn push(&mut self, number: usize, item: T) -> Vec<T> {
        if number < self.next {
            return vec![item];
        }
        self.waiting.insert(number, item);
        let mut due = Vec::new();
        while let Some(item) = self.waiting.remove(&self.next) {
            due.push(item);
            self.next += 1;
        }
        due
    }

    /// What is still held back, in order: for the end of a command that was cut short.
    pub fn into_rest(self) -> impl Iterator<Item = T> {
        self.waiting.into_values()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_item_waits_for_those_before_it() {
        let mut order = InOrder::default();
        assert!(order.push(2, 'c').is_empty());
        assert_eq!(order.push(0, 'a'), ['a']);
        assert_eq!(order.push(1, 'b'), ['b', 'c']);
        assert!(order.push(5, 'f').is_empty());
        assert!(order.push(4, 'e').is_empty());
        assert_eq!(order.into_rest().collect::<String>(), "ef");
    }

    proptest! {
        #[test]
        fn any_order_in_gives_one_order_out(numbers in Just((0..40usize).collect::<Vec<_>>()).prop_shuffle()) {
            let mut order = InOrder::default();
            let out: Vec<usize> = numbers.iter().flat_map(|&number| order.push(number, number)).collect();
            prop_assert_eq!(out, (0..40).collect::<Vec<_>>());
        }
    }
}
