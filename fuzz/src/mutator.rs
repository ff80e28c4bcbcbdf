//! Mutations of DER that keep it valid DER: one value is changed, and all enclosing lengths are corrected. Otherwise almost no input
//! would get past the first length.

use crate::targets::der::Der;

/// libFuzzer's own mutator: arguments are a buffer, the current length and the maximum length; returns the new length.
pub type Plain<'a> = &'a mut dyn FnMut(&mut [u8], usize, usize) -> usize;

/// Values from certificates and messages that are worth inserting elsewhere.
const PIECES: &[&[u8]] = &[
    &[0x05, 0x00],
    &[0x02, 0x01, 0x00],
    &[0x02, 0x01, 0x03],
    &[0x02, 0x08, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
    &[0x02, 0x09, 0x00, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
    &[0x02, 0x01, 0xff],
    &[0x01, 0x01, 0xff],
    &[0x0a, 0x01, 0x01],
    &[0x04, 0x00],
    &[0x03, 0x01, 0x00],
    &[0x30, 0x00],
    &[0x31, 0x00],
    &[0xa0, 0x00],
    &[0xa1, 0x00],
    &[0x80, 0x00],
    // SHA-256 without parameters and with NULL, ECDSA with SHA-256, id-data.
    &[0x30, 0x0b, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01],
    &[0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01, 0x05, 0x00],
    &[0x30, 0x0a, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02],
    &[0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x07, 0x01],
    // Times before and after all others.
    b"\x17\x0d500101000000Z",
    b"\x18\x0f99991231235959Z",
    b"\x0c\x0bnanite-fred",
    b"\x0c\x09mapper-m1",
    b"\x81\x07mappers",
    b"\x81\x06agents",
    b"\x0c\x04json",
    b"\x0c\x07msgpack",
];

/// A simple pseudo-random generator (xorshift): the same numbers for the same seed.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() >> 16) as usize % end.max(1)
    }
}

/// Mutates an input in place; returns its new length.
pub fn mutate(data: &mut [u8], size: usize, max_size: usize, seed: u32, plain: Plain<'_>) -> usize {
    let mut numbers = Numbers(u64::from(seed) << 1 | 1);
    let _ = (numbers.next(), numbers.next(), numbers.next());
    let Some(input) = data.get(..size).filter(|_| numbers.below(4) > 0) else {
        return plain(data, size, max_size);
    };
    let (mut values, rest) = Der::all(input);
    let mut rest = rest.to_vec();
    if values.is_empty() {
        return plain(data, size, max_size);
    }
    if !rest.is_empty() && numbers.below(3) == 0 {
        change_bytes(&mut rest, plain);
    } else {
        for _ in 0..=numbers.below(3) {
            change(&mut values, &mut numbers, plain);
        }
    }
    let mut out: Vec<u8> = values.iter().flat_map(Der::bytes).collect();
    out.extend(rest);
    match data.get_mut(..out.len().min(max_size)) {
        Some(place) if place.len() == out.len() => {
            place.copy_from_slice(&out);
            out.len()
        }
        _ => plain(data, size, max_size),
    }
}

fn change_bytes(bytes: &mut Vec<u8>, plain: Plain<'_>) {
    let (length, room) = (bytes.len(), bytes.len() + 16);
    bytes.resize(room, 0);
    let length = plain(bytes, length, room);
    bytes.truncate(length);
}

/// The paths of all values.
fn places(values: &[Der], above: &[usize], found: &mut Vec<Vec<usize>>) {
    for (index, value) in values.iter().enumerate() {
        let place = [above, &[index]].concat();
        places(value.inside(), &place, found);
        found.push(place);
    }
}

/// The list that contains the value at this path.
fn list<'a>(values: &'a mut Vec<Der>, place: &[usize]) -> Option<&'a mut Vec<Der>> {
    place.iter().try_fold(values, |values, index| match values.get_mut(*index)? {
        Der::Node(_, _, inside) => Some(inside),
        Der::Leaf(..) => None,
    })
}

fn change(values: &mut Vec<Der>, numbers: &mut Numbers, plain: Plain<'_>) {
    let mut all = Vec::new();
    places(values, &[], &mut all);
    let Some(place) = all.get(numbers.below(all.len())).cloned() else { return };
    let other = all.get(numbers.below(all.len())).cloned().unwrap_or_default();
    let copy = other.split_last().and_then(|(last, above)| list(values, above)?.get(*last).cloned());
    let Some((&at, above)) = place.split_last() else { return };
    let Some(siblings) = list(values, above) else { return };
    match numbers.below(12) {
        0 => drop(siblings.remove(at)),
        1 => siblings.insert(at, siblings[at].clone()),
        2 => {
            let with = numbers.below(siblings.len());
            siblings.swap(at, with);
        }
        3 => siblings.extend(copy),
        4 => {
            if let Some(copy) = copy {
                siblings[at] = copy;
            }
        }
        5 | 6 => {
            let piece = PIECES.get(numbers.below(PIECES.len())).and_then(|piece| Der::one(piece));
            if let Some(piece) = piece {
                if numbers.below(2) == 0 { siblings[at] = piece } else { siblings.insert(at, piece) }
            }
        }
        7 => {
            let bits = [0x01, 0x02, 0x04, 0x10, 0x20, 0x80, 0xa0];
            match &mut siblings[at] {
                Der::Leaf(tag, _) | Der::Node(tag, _, _) => *tag ^= bits[numbers.below(bits.len())],
            }
        }
        _ => match &mut siblings[at] {
            Der::Leaf(_, bytes) => change_bytes(bytes, plain),
            Der::Node(_, _, inside) => {
                let by = numbers.below(inside.len()).min(inside.len());
                inside.rotate_left(by);
            }
        },
    }
}
