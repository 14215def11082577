//! BTF, the kernel's type information: parsed from its raw form, and used to turn bytes into JSON values.
//!
//! Promises never to panic whatever the bytes: an unknown or broken type is shown as hexadecimal. Never writes BTF.
//! Tested below on BTF made by hand; on that of a kernel in `tests/tests/map_inspection.rs`.

use std::{
    fmt::Write as _,
    net::{Ipv4Addr, Ipv6Addr},
};

use serde_json::{Map, Value, json};

const MAGIC: u16 = 0xeb9f;
/// Nested types followed before the rest is opaque; ours nest three deep.
const DEPTH: usize = 32;
/// Types visited for one resolution: broken BTF can make a tree grow without end.
const TYPES: usize = 10_000;

mod kind {
    pub const INT: u32 = 1;
    pub const PTR: u32 = 2;
    pub const ARRAY: u32 = 3;
    pub const STRUCT: u32 = 4;
    pub const UNION: u32 = 5;
    pub const ENUM: u32 = 6;
    pub const TYPEDEF: u32 = 8;
    pub const VOLATILE: u32 = 9;
    pub const CONST: u32 = 10;
    pub const RESTRICT: u32 = 11;
    pub const FUNC_PROTO: u32 = 13;
    pub const VAR: u32 = 14;
    pub const DATASEC: u32 = 15;
    pub const FLOAT: u32 = 16;
    pub const DECL_TAG: u32 = 17;
    pub const TYPE_TAG: u32 = 18;
    pub const ENUM64: u32 = 19;
    pub const LAST: u32 = ENUM64;
}

/// A BTF object.
#[derive(Debug)]
pub struct Btf {
    types: Vec<Raw>,
    strings: Vec<u8>,
}

/// One type as it is written: the common header, and the words after it.
#[derive(Debug)]
struct Raw {
    info: u32,
    size_or_type: u32,
    words: Vec<u32>,
}

impl Raw {
    fn kind(&self) -> u32 {
        (self.info >> 24) & 0x1f
    }

    fn is_flagged(&self) -> bool {
        self.info >> 31 == 1
    }
}

/// A type, resolved as far as values need it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Type {
    /// An integer.
    Int {
        /// Bytes.
        size: usize,
        /// Two's complement.
        signed: bool,
        /// Shown as true or false.
        boolean: bool,
    },
    /// Elements one after the other.
    Array {
        /// Type of an element.
        element: Box<Self>,
        /// How many.
        count: usize,
    },
    /// A struct or union.
    Struct {
        /// Bytes.
        size: usize,
        /// Its fields.
        members: Vec<Member>,
    },
    /// An enum without data.
    Enum {
        /// Bytes.
        size: usize,
        /// Names of values.
        names: Vec<(u64, String)>,
    },
    /// Bytes of which no more is known.
    Opaque {
        /// Bytes.
        size: usize,
    },
}

/// One field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its name.
    pub name: String,
    /// Where it begins, bytes.
    pub offset: usize,
    /// Its type; opaque for bit fields.
    pub kind: Type,
}

impl Type {
    /// Bytes a value takes.
    pub fn size(&self) -> usize {
        match self {
            Self::Int { size, .. }
            | Self::Struct { size, .. }
            | Self::Enum { size, .. }
            | Self::Opaque { size } => *size,
            Self::Array { element, count } => element.size().saturating_mul(*count),
        }
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().copied().map(u32::from_ne_bytes)
}

impl Btf {
    /// Reads the raw form. `None` when it is not BTF of this machine's byte order, or has kinds nobody knows.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let magic = bytes.first_chunk().copied().map(u16::from_ne_bytes)?;
        let header = word(bytes, 4)? as usize;
        let section = |at: usize| -> Option<&[u8]> {
            let (start, len) =
                (header.checked_add(word(bytes, at)? as usize)?, word(bytes, at + 4)? as usize);
            bytes.get(start..start.checked_add(len)?)
        };
        if magic != MAGIC {
            return None;
        }
        let (types, strings) = (section(8)?, section(16)?);
        let mut parsed = Vec::new();
        let mut at = 0;
        while at < types.len() {
            // The first word is the name, which no value needs.
            let (info, size_or_type) = (word(types, at + 4)?, word(types, at + 8)?);
            let mut raw = Raw { info, size_or_type, words: Vec::new() };
            at += 12;
            for _ in 0..trailing_words(raw.kind(), (info & 0xffff) as usize)? {
                raw.words.push(word(types, at)?);
                at += 4;
            }
            parsed.push(raw);
        }
        Some(Self { types: parsed, strings: strings.to_vec() })
    }

    fn raw(&self, id: u32) -> Option<&Raw> {
        self.types.get((id as usize).checked_sub(1)?)
    }

    fn string(&self, offset: u32) -> String {
        let bytes = self.strings.get(offset as usize..).unwrap_or_default();
        let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
        String::from_utf8_lossy(&bytes[..end]).into_owned()
    }

    /// The type with this id. `None` for id 0 and for ids that are not there.
    pub fn resolve(&self, id: u32) -> Option<Type> {
        self.walk(id, 0, &mut 0)
    }

    fn walk(&self, id: u32, depth: usize, visited: &mut usize) -> Option<Type> {
        *visited += 1;
        if depth > DEPTH || *visited > TYPES {
            return None;
        }
        let raw = self.raw(id)?;
        let size = raw.size_or_type as usize;
        match raw.kind() {
            kind::INT => {
                let encoding = (raw.words.first()? >> 24) & 0xf;
                Some(Type::Int { size, signed: encoding & 1 != 0, boolean: encoding & 4 != 0 })
            }
            kind::PTR => Some(Type::Opaque { size: 8 }),
            kind::ARRAY => {
                let element = self.walk(*raw.words.first()?, depth + 1, visited)?;
                Some(Type::Array { element: Box::new(element), count: *raw.words.get(2)? as usize })
            }
            kind::STRUCT | kind::UNION => Some(self.walk_struct(raw, depth, visited)),
            kind::ENUM | kind::ENUM64 => Some(self.walk_enum(raw)),
            kind::TYPEDEF | kind::VOLATILE | kind::CONST | kind::RESTRICT | kind::TYPE_TAG => {
                self.walk(raw.size_or_type, depth + 1, visited)
            }
            kind::FLOAT => Some(Type::Opaque { size }),
            _ => None,
        }
    }

    fn walk_struct(&self, raw: &Raw, depth: usize, visited: &mut usize) -> Type {
        let mut members = Vec::new();
        for member in raw.words.chunks_exact(3) {
            let (name, id, offset) = (self.string(member[0]), member[1], member[2]);
            // Flagged structs keep the width of bit fields in the upper byte.
            let (bits, width) =
                if raw.is_flagged() { (offset & 0x00ff_ffff, offset >> 24) } else { (offset, 0) };
            let whole = width == 0 && bits.is_multiple_of(8);
            if let Some(kind) = self.walk(id, depth + 1, visited).filter(|_| whole) {
                members.push(Member { name, offset: bits as usize / 8, kind });
            }
        }
        Type::Struct { size: raw.size_or_type as usize, members }
    }

    fn walk_enum(&self, raw: &Raw) -> Type {
        let wide = raw.kind() == kind::ENUM64;
        let names = raw.words.chunks_exact(if wide { 3 } else { 2 }).map(|value| {
            let high = value.get(2).map_or(0, |high| u64::from(*high) << 32);
            (high | u64::from(value[1]), self.string(value[0]))
        });
        Type::Enum { size: raw.size_or_type as usize, names: names.collect() }
    }
}

/// Words after the header of a type; `None` for kinds that came after this was written.
fn trailing_words(of: u32, members: usize) -> Option<usize> {
    match of {
        kind::INT | kind::VAR | kind::DECL_TAG => Some(1),
        kind::ARRAY => Some(3),
        kind::STRUCT | kind::UNION | kind::DATASEC | kind::ENUM64 => Some(3 * members),
        kind::ENUM | kind::FUNC_PROTO => Some(2 * members),
        0..=kind::LAST => Some(0),
        _ => None,
    }
}

/// The value of these bytes: by type where there is one that fits, else a number (8 bytes) or hexadecimal.
pub(super) fn decode_or_raw(kind: Option<&Type>, bytes: &[u8]) -> Value {
    match kind {
        Some(kind) if kind.size() <= bytes.len() && kind.size() > 0 => decode(kind, bytes),
        // Cookies are the one key of ours that maps of maps have, whose BTF the kernel does not keep.
        _ => bytes.try_into().map_or_else(|_| hex(bytes), |bytes| json!(u64::from_ne_bytes(bytes))),
    }
}

fn decode(kind: &Type, bytes: &[u8]) -> Value {
    let Some(bytes) = bytes.get(..kind.size()) else { return hex(bytes) };
    match kind {
        Type::Int { boolean: true, .. } => json!(bytes.iter().any(|b| *b != 0)),
        Type::Int { signed, .. } => integer(bytes, *signed),
        Type::Array { element, .. } if matches!(**element, Type::Int { size: 1, .. }) => hex(bytes),
        Type::Array { element, .. } => {
            bytes.chunks_exact(element.size().max(1)).map(|one| decode(element, one)).collect()
        }
        Type::Struct { members, .. } => {
            let mut object = Map::new();
            for member in members {
                if let Some(value) = field(member, bytes) {
                    object.insert(member.name.clone(), value);
                }
            }
            Value::Object(object)
        }
        Type::Enum { names, .. } => {
            let number = integer(bytes, false);
            let name = names.iter().find(|(value, _)| number.as_u64() == Some(*value));
            name.map_or(number, |(_, name)| json!(name))
        }
        Type::Opaque { .. } => hex(bytes),
    }
}

/// The value of a field; `None` for padding. Bytes named as addresses are shown as such.
fn field(member: &Member, bytes: &[u8]) -> Option<Value> {
    let bytes = bytes.get(member.offset..)?.get(..member.kind.size())?;
    let is_bytes = matches!(&member.kind, Type::Array { element, .. } if element.size() == 1);
    match member.name.trim_start_matches('_') {
        name if name.starts_with("pad") && bytes.iter().all(|b| *b == 0) => None,
        "ip" | "v6" if is_bytes && let Ok(ip) = <[u8; 16]>::try_from(bytes) => {
            Some(json!(Ipv6Addr::from(ip).to_canonical()))
        }
        "ip" | "v4" if is_bytes && let Ok(ip) = <[u8; 4]>::try_from(bytes) => Some(json!(Ipv4Addr::from(ip))),
        _ => Some(decode(&member.kind, bytes)),
    }
}

fn integer(bytes: &[u8], signed: bool) -> Value {
    let mut wide = [0_u8; 8];
    let (true, Some(low)) = (bytes.len() <= 8, wide.get_mut(..bytes.len())) else { return hex(bytes) };
    low.copy_from_slice(bytes);
    let value = u64::from_le_bytes(if cfg!(target_endian = "big") { swapped(bytes) } else { wide });
    if signed {
        // An int of no bytes does not get here: such a type is never decoded.
        let unused = (64 - 8 * bytes.len() as u32).min(63);
        return json!((value << unused).cast_signed() >> unused);
    }
    json!(value)
}

/// The same number with its lowest byte first.
fn swapped(bytes: &[u8]) -> [u8; 8] {
    let mut wide = [0; 8];
    wide.iter_mut().zip(bytes.iter().rev()).for_each(|(to, from)| *to = *from);
    wide
}

fn hex(bytes: &[u8]) -> Value {
    let mut text = String::with_capacity(2 + 2 * bytes.len());
    text.push_str("0x");
    for byte in bytes {
        let _ = write!(text, "{byte:02x}");
    }
    json!(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// BTF being written by hand.
    #[derive(Default)]
    struct Builder {
        types: Vec<u8>,
        strings: Vec<u8>,
        count: u32,
    }

    impl Builder {
        fn add(&mut self, name: &str, info: (u32, u32), size: u32, words: &[u32]) -> u32 {
            if self.strings.is_empty() {
                self.strings.push(0);
            }
            let name = self.name(name);
            let (kind, members) = info;
            for word in [name, (kind << 24) | members, size].iter().chain(words) {
                self.types.extend(word.to_ne_bytes());
            }
            self.count += 1;
            self.count
        }

        fn name(&mut self, name: &str) -> u32 {
            let offset = self.strings.len() as u32;
            self.strings.extend(name.bytes().chain([0]));
            offset
        }

        fn int(&mut self, size: u32, encoding: u32) -> u32 {
            self.add("int", (kind::INT, 0), size, &[(encoding << 24) | (size * 8)])
        }

        fn bytes(&self) -> Vec<u8> {
            let (types, strings) = (self.types.len() as u32, self.strings.len() as u32);
            let mut out = MAGIC.to_ne_bytes().to_vec();
            out.extend([1, 0]);
            for word in [24, 0, types, types, strings] {
                out.extend(u32::to_ne_bytes(word));
            }
            out.extend(&self.types);
            out.extend(&self.strings);
            out
        }
    }

    /// `struct Flow { u64 id; struct Addr { u8 ip[16]; u16 port; u16 pad; } local; i32 delta; enum u32; u8 v4[4] }`
    fn flow() -> (Builder, u32) {
        let mut b = Builder::default();
        let (u8_, u16_, u64_) = (b.int(1, 0), b.int(2, 0), b.int(8, 0));
        let i32_ = b.int(4, 1);
        let array = b.add("", (kind::ARRAY, 0), 0, &[u8_, u8_, 16]);
        let four = b.add("", (kind::ARRAY, 0), 0, &[u8_, u8_, 4]);
        let [ip, port, pad] = ["ip", "port", "pad"].map(|name| b.name(name));
        let addr = b.add("Addr", (kind::STRUCT, 3), 20, &[ip, array, 0, port, u16_, 128, pad, u16_, 144]);
        let on = b.name("ON");
        let state = b.add("State", (kind::ENUM, 1), 4, &[on, 7]);
        let typedef = b.add("alias", (kind::TYPEDEF, 0), u64_, &[]);
        let names = ["id", "local", "delta", "state", "v4"].map(|name| b.name(name));
        let words: Vec<u32> = [(typedef, 0), (addr, 64), (i32_, 224), (state, 256), (four, 288)]
            .iter()
            .zip(names)
            .flat_map(|((id, offset), name)| [name, *id, *offset])
            .collect();
        let flow = b.add("Flow", (kind::STRUCT, 5), 40, &words);
        (b, flow)
    }

    fn value() -> Vec<u8> {
        let mut bytes = u64::MAX.to_ne_bytes().to_vec();
        bytes.extend([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, 1]);
        bytes.extend(8080_u16.to_ne_bytes());
        bytes.extend([0, 0]);
        bytes.extend((-3_i32).to_ne_bytes());
        bytes.extend(7_u32.to_ne_bytes());
        bytes.extend([192, 168, 0, 1]);
        bytes
    }

    #[test]
    fn structs_addresses_enums_and_signs_are_shown() {
        let (builder, id) = flow();
        let btf = Btf::parse(&builder.bytes());
        let kind = btf.as_ref().and_then(|btf| btf.resolve(id));
        assert_eq!(
            decode_or_raw(kind.as_ref(), &value()),
            json!({
                "id": u64::MAX,
                "local": {"ip": "10.0.0.1", "port": 8080},
                "delta": -3,
                "state": "ON",
                "v4": "192.168.0.1",
            })
        );
        // A value of an older, shorter layout is not read past its end.
        assert_eq!(decode_or_raw(kind.as_ref(), &value()[..8]), json!(u64::MAX));
        assert_eq!(decode_or_raw(None, &[1, 2, 0xff]), json!("0x0102ff"));
    }

    #[test]
    fn broken_btf_never_panics_or_runs_for_ever() {
        let (builder, id) = flow();
        let bytes = builder.bytes();
        for cut in 0..bytes.len() {
            if let Some(btf) = Btf::parse(&bytes[..cut]) {
                btf.resolve(id);
            }
            for byte in [0, 1, 0x7f, 0xff] {
                let mut broken = bytes.clone();
                broken[cut] = byte;
                if let Some(btf) = Btf::parse(&broken) {
                    let kind = btf.resolve(id);
                    decode_or_raw(kind.as_ref(), &value());
                }
            }
        }
        let mut endless = Builder::default();
        endless.add("s", (kind::STRUCT, 2), 8, &[0, 1, 0, 0, 1, 0]);
        assert!(Btf::parse(&endless.bytes()).is_some_and(|btf| btf.resolve(1).is_some()));
    }
}
