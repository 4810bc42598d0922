//! The books of slabs: which pieces of large allocations are taken. Owns no memory, so that what a model's steps need can be
//! counted without a device.
//!
//! Pieces are taken first fit and given back in any order. Slabs are added when no piece is large enough and never returned:
//! the same requests starting from an empty book get the same places.

/// Alignment of every piece.
const ALIGN: usize = 512;
/// Slabs are multiples of this.
const SLAB_BYTES: usize = 64 << 20;

/// A piece of a slab.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Number of the slab.
    pub slab: usize,
    /// Bytes from its start.
    pub offset: usize,
    /// Length in bytes.
    pub bytes: usize,
}

/// Slabs by size, and the free pieces of each (offset, bytes) in order.
#[derive(Debug, Default)]
pub struct SlabBook {
    free: Vec<Vec<(usize, usize)>>,
    bytes: usize,
    taken: usize,
    most: usize,
}

impl SlabBook {
    /// A piece of at least `bytes`, if some slab has one.
    pub fn take(&mut self, bytes: usize) -> Option<Place> {
        let bytes = piece_bytes(bytes);
        let found = self.free.iter_mut().enumerate().find_map(|(n, free)| Some((n, take(free, bytes)?)));
        let place = found.map(|(slab, offset)| Place { slab, offset, bytes })?;
        self.taken += bytes;
        self.most = self.most.max(self.taken);
        Some(place)
    }

    /// Size of the slab to add for a piece of `bytes`.
    pub fn slab_bytes(bytes: usize) -> usize {
        piece_bytes(bytes).next_multiple_of(SLAB_BYTES)
    }

    /// Notes a new slab of `bytes`, all of it free.
    pub fn add(&mut self, bytes: usize) {
        self.free.push(vec![(0, bytes)]);
        self.bytes += bytes;
    }

    /// Gives a piece back.
    pub fn give_back(&mut self, place: Place) {
        if let Some(free) = self.free.get_mut(place.slab) {
            give_back(free, place.offset, place.bytes);
            self.taken -= place.bytes;
        }
    }

    /// Size of the one slab that would take the place of all, with an eighth for pieces that do not fit each other's gaps; `None`
    /// while pieces are taken, and where there is nothing to gain.
    pub fn joined_bytes(&self) -> Option<usize> {
        let joined = Self::slab_bytes(self.most + self.most / 8);
        (self.taken == 0 && joined < self.bytes).then_some(joined)
    }

    /// Slabs so far.
    pub fn slabs(&self) -> usize {
        self.free.len()
    }

    /// Bytes of all slabs.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Bytes of the pieces that are taken.
    pub fn taken(&self) -> usize {
        self.taken
    }

    /// Most bytes of pieces that were taken at once.
    pub fn most(&self) -> usize {
        self.most
    }
}

fn piece_bytes(bytes: usize) -> usize {
    bytes.max(1).next_multiple_of(ALIGN)
}

/// First free piece of `bytes`, taken out of the list.
fn take(free: &mut Vec<(usize, usize)>, bytes: usize) -> Option<usize> {
    let at = free.iter().position(|(_, length)| *length >= bytes)?;
    let (offset, length) = free[at];
    if length == bytes {
        free.remove(at);
    } else {
        free[at] = (offset + bytes, length - bytes);
    }
    Some(offset)
}

/// Puts a piece back and joins it with its neighbours.
fn give_back(free: &mut Vec<(usize, usize)>, offset: usize, bytes: usize) {
    let at = free.partition_point(|(start, _)| *start < offset);
    free.insert(at, (offset, bytes));
    if at + 1 < free.len() && free[at].0 + free[at].1 == free[at + 1].0 {
        free[at].1 += free[at + 1].1;
        free.remove(at + 1);
    }
    if at > 0 && free[at - 1].0 + free[at - 1].1 == free[at].0 {
        free[at - 1].1 += free[at].1;
        free.remove(at);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_join_when_they_come_back() {
        let mut free = vec![(0, 100)];
        let pieces: Vec<usize> = [10, 20, 30].iter().map(|&bytes| take(&mut free, bytes).unwrap()).collect();
        assert_eq!((pieces.as_slice(), free.as_slice()), ([0, 10, 30].as_slice(), [(60, 40)].as_slice()));
        give_back(&mut free, 10, 20);
        assert_eq!(free, [(10, 20), (60, 40)]);
        assert_eq!(take(&mut free, 21), Some(60));
        give_back(&mut free, 60, 21);
        give_back(&mut free, 0, 10);
        assert_eq!(free, [(0, 30), (60, 40)]);
        give_back(&mut free, 30, 30);
        assert_eq!(free, [(0, 100)]);
        assert_eq!(take(&mut free, 101), None);
    }

    #[test]
    fn a_book_adds_slabs_and_keeps_them() {
        let mut book = SlabBook::default();
        assert_eq!(book.take(1), None);
        book.add(SlabBook::slab_bytes(1));
        let small = book.take(1).unwrap();
        assert_eq!((small, book.taken()), (Place { slab: 0, offset: 0, bytes: 512 }, 512));
        assert_eq!(book.take(64 << 20), None);
        book.add(SlabBook::slab_bytes((64 << 20) + 1));
        let large = book.take((64 << 20) + 1).unwrap();
        assert_eq!((large.slab, large.offset, book.bytes(), book.slabs()), (1, 0, 192 << 20, 2));
        book.give_back(small);
        book.give_back(large);
        assert_eq!((book.taken(), book.bytes()), (0, 192 << 20));
        assert_eq!(book.joined_bytes(), Some(128 << 20));
        assert_eq!(book.take(128 << 20).map(|place| place.slab), Some(1));
    }

    #[test]
    fn slabs_of_many_sizes_become_one() {
        let mut book = SlabBook::default();
        for size in [100usize << 20, 200 << 20, 300 << 20] {
            book.add(SlabBook::slab_bytes(size));
            let place = book.take(size).unwrap();
            assert_eq!(book.joined_bytes(), None, "a piece is taken");
            book.give_back(place);
        }
        // 300 MiB at once in slabs of 128, 256 and 320 MiB: 338 MiB are 6 times 64.
        assert_eq!((book.bytes() >> 20, book.most() >> 20), (704, 300));
        assert_eq!(book.joined_bytes(), Some(384 << 20));
    }
}
