//! Storage of sequences: constant-time access by id, places used again, ids never. Must not know their order.

use super::sequence::{SeqId, Sequence};

/// All sequences that have not ended.
#[derive(Debug, Default)]
pub struct Arena {
    places: Vec<Option<(u64, Box<Sequence>)>>,
    free: Vec<u32>,
    next_unique: u64,
}

impl Arena {
    /// Keeps the sequence that `make` builds for its new id.
    pub fn insert(&mut self, make: impl FnOnce(SeqId) -> Sequence) -> SeqId {
        self.next_unique += 1;
        let index = self.free.pop().unwrap_or(self.places.len() as u32);
        let id = SeqId { index, unique: self.next_unique };
        let entry = Some((id.unique, Box::new(make(id))));
        match self.places.get_mut(index as usize) {
            Some(place) => *place = entry,
            None => self.places.push(entry),
        }
        id
    }

    /// The sequence of that id, if it has not ended.
    pub fn get(&self, id: SeqId) -> Option<&Sequence> {
        match self.places.get(id.index as usize) {
            Some(Some((unique, sequence))) if *unique == id.unique => Some(sequence),
            _ => None,
        }
    }

    /// As [`Self::get`], to change it.
    pub fn get_mut(&mut self, id: SeqId) -> Option<&mut Sequence> {
        match self.places.get_mut(id.index as usize) {
            Some(Some((unique, sequence))) if *unique == id.unique => Some(sequence),
            _ => None,
        }
    }

    /// Forgets a sequence.
    pub fn remove(&mut self, id: SeqId) -> Option<Box<Sequence>> {
        self.get(id)?;
        self.free.push(id.index);
        self.places[id.index as usize].take().map(|(_, sequence)| sequence)
    }

    /// Sequences kept.
    pub fn len(&self) -> usize {
        self.places.len() - self.free.len()
    }

    /// All of them, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (SeqId, &Sequence)> {
        self.places.iter().enumerate().filter_map(|(index, place)| {
            let (unique, sequence) = place.as_ref()?;
            Some((SeqId { index: index as u32, unique: *unique }, sequence.as_ref()))
        })
    }
}
