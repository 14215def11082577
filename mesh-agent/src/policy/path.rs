//! The one form of a path in which policies are asked about it: Istio's `pathNormalization`.
//!
//! Promises that two spellings which a server may take for the same path have one form, that the form of a form is itself,
//! and that a path which needs no change costs one look at its bytes. What servers read in different ways is refused. The
//! query is never part of it. Tested below, and by the fuzz target `path`.

use std::borrow::Cow;

use crate::config::PathNormalization;

/// What a path cannot have, since servers do not agree on what it means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// A `%` without two hexadecimal digits after it.
    #[error("the path has a % that begins no percent-encoding")]
    Encoding,
    /// `%00`.
    #[error("the path has an encoded zero byte")]
    Zero,
    /// `/..;x/`: servers that know parameters of segments see a dot segment, others do not.
    #[error("the path has a dot segment with a parameter")]
    DotParameter,
}

/// The normal form of a path without its query.
///
/// # Errors
/// [`Malformed`], unless nothing is to be normalised.
pub fn normalise(path: &str, how: PathNormalization) -> Result<Cow<'_, str>, Malformed> {
    // What does not begin with a slash is no path: the `*` of OPTIONS.
    if how == PathNormalization::None || !path.starts_with('/') || is_normal(path.as_bytes(), how) {
        return Ok(Cow::Borrowed(path));
    }
    let decoded = decode(path.as_bytes(), how)?;
    let mut segments: Vec<&[u8]> = Vec::new();
    let mut parts = decoded[1..].split(|byte| *byte == b'/').peekable();
    while let Some(segment) = parts.next() {
        let last = parts.peek().is_none();
        match segment {
            b"." | b".." => {
                if segment == b".." {
                    segments.pop();
                }
                if last {
                    segments.push(b"");
                }
            }
            segment if is_dot_with_parameter(segment) => return Err(Malformed::DotParameter),
            segment => segments.push(segment),
        }
    }
    if how >= PathNormalization::MergeSlashes {
        // An empty last one is the slash at the end.
        let last = segments.pop();
        segments.retain(|segment| !segment.is_empty());
        segments.extend(last);
    }
    let mut normal = Vec::with_capacity(decoded.len());
    for segment in &segments {
        normal.push(b'/');
        normal.extend_from_slice(segment);
    }
    if normal.is_empty() {
        normal.push(b'/');
    }
    // Only ASCII bytes were taken away or put in.
    Ok(Cow::Owned(String::from_utf8(normal).unwrap_or_default()))
}

/// Whether nothing would change, as far as a look at pairs of bytes tells: for most paths it does.
fn is_normal(path: &[u8], how: PathNormalization) -> bool {
    let merged = how >= PathNormalization::MergeSlashes;
    !path.iter().any(|byte| matches!(byte, b'%' | b'\\'))
        && !path.windows(2).any(|pair| pair == b"/." || (merged && pair == b"//"))
}

/// Percent-encoding as RFC 3986 section 6.2.2 has it: what need not be encoded is not, and the rest in capitals.
fn decode(path: &[u8], how: PathNormalization) -> Result<Vec<u8>, Malformed> {
    let mut out = Vec::with_capacity(path.len());
    let mut left = path;
    while let Some((byte, rest)) = left.split_first() {
        left = rest;
        match byte {
            b'\\' => out.push(b'/'),
            b'%' => {
                let (digits, rest) = left.split_first_chunk::<2>().ok_or(Malformed::Encoding)?;
                left = rest;
                let [high, low] = digits.map(|digit| char::from(digit).to_digit(16));
                let (Some(high), Some(low)) = (high, low) else { return Err(Malformed::Encoding) };
                let value = (high * 16 + low) as u8;
                match value {
                    0 => return Err(Malformed::Zero),
                    b'/' | b'\\' if how == PathNormalization::DecodeAndMergeSlashes => out.push(b'/'),
                    value if value.is_ascii_alphanumeric() || b"-._~".contains(&value) => out.push(value),
                    _ => out.extend([b'%', digits[0].to_ascii_uppercase(), digits[1].to_ascii_uppercase()]),
                }
            }
            byte => out.push(*byte),
        }
    }
    Ok(out)
}

fn is_dot_with_parameter(segment: &[u8]) -> bool {
    let rest = segment.strip_prefix(b"..").or_else(|| segment.strip_prefix(b"."));
    rest.is_some_and(|rest| rest.starts_with(b";") || rest.starts_with(b"%3B"))
}

#[cfg(test)]
mod tests {
    use PathNormalization::{Base, DecodeAndMergeSlashes, MergeSlashes, None};
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn spellings_have_one_form() {
        let table = [
            (Base, "/", "/"),
            (Base, "*", "*"),
            (Base, "/a/b", "/a/b"),
            (Base, "/a/./b", "/a/b"),
            (Base, "/a/../b", "/b"),
            (Base, "/../../a", "/a"),
            (Base, "/..", "/"),
            (Base, "/a/..", "/"),
            (Base, "/a/b/..", "/a/"),
            (Base, "/a/.", "/a/"),
            (Base, "/a/%2e%2e/b", "/b"),
            (Base, "/a/.%2E/b", "/b"),
            (Base, "/a/%2e/b", "/a/b"),
            (Base, "/a\\..\\b", "/b"),
            (Base, "\\a", "\\a"),
            (Base, "/%61dmin", "/admin"),
            (Base, "/%41%7e%2d", "/A~-"),
            (Base, "/a%2fb", "/a%2Fb"),
            (Base, "/a%5cb", "/a%5Cb"),
            (Base, "/a/..%2fb", "/a/..%2Fb"),
            (Base, "/%c3%a9", "/%C3%A9"),
            (Base, "/a%252e%252e/b", "/a%252e%252e/b"),
            (Base, "/a//b", "/a//b"),
            (Base, "/a//../b", "/a/b"),
            (Base, "/.well-known/x", "/.well-known/x"),
            (Base, "/a/...", "/a/..."),
            (Base, "/a;b=c/d", "/a;b=c/d"),
            (Base, "/é/../a", "/a"),
            (MergeSlashes, "/a//b", "/a/b"),
            (MergeSlashes, "//a///b//", "/a/b/"),
            (MergeSlashes, "//", "/"),
            (MergeSlashes, "/a//../b", "/a/b"),
            (MergeSlashes, "/a%2f%2fb", "/a%2F%2Fb"),
            (DecodeAndMergeSlashes, "/a%2fb", "/a/b"),
            (DecodeAndMergeSlashes, "/a%2F%5cb", "/a/b"),
            (DecodeAndMergeSlashes, "/a/..%2fb", "/b"),
            (DecodeAndMergeSlashes, "/a%5C..%5cb", "/b"),
            (DecodeAndMergeSlashes, "/a/%2e%2e%2fb", "/b"),
            (DecodeAndMergeSlashes, "/a%252fb", "/a%252fb"),
            (None, "/a/../%2e//b", "/a/../%2e//b"),
            (None, "/%", "/%"),
        ];
        for (how, path, normal) in table {
            assert_eq!(normalise(path, how).as_deref(), Ok(normal), "{how:?} {path}");
        }
    }

    #[test]
    fn what_servers_do_not_agree_on_is_refused() {
        let table = [
            ("/%", Malformed::Encoding),
            ("/a%2", Malformed::Encoding),
            ("/%zz", Malformed::Encoding),
            ("/%%32e", Malformed::Encoding),
            ("/%+1", Malformed::Encoding),
            ("/%u002e", Malformed::Encoding),
            ("/a%00", Malformed::Zero),
            ("/public/..;/admin", Malformed::DotParameter),
            ("/public/..;a=b/admin", Malformed::DotParameter),
            ("/public/.;/admin", Malformed::DotParameter),
            ("/public/%2e%2e%3b/admin", Malformed::DotParameter),
        ];
        for (path, malformed) in table {
            for how in [Base, MergeSlashes, DecodeAndMergeSlashes] {
                assert_eq!(normalise(path, how), Err(malformed), "{how:?} {path}");
            }
        }
    }

    proptest! {
        #[test]
        fn the_form_of_a_form_is_itself(tail in "([a-c.;/\\\\]|%2[eEfF]|%5[cC]|%3[bB]|%25|%61|é){0,24}") {
            let path = format!("/{tail}");
            for how in [Base, MergeSlashes, DecodeAndMergeSlashes] {
                let Ok(normal) = normalise(&path, how) else { continue };
                prop_assert_eq!(normalise(&normal, how), Ok(Cow::Borrowed(&*normal)), "{:?} {}", how, path);
                prop_assert!(normal.starts_with('/') && !normal.contains('\\'));
                prop_assert!(normal.split('/').all(|segment| segment != "." && segment != ".."), "{}", normal);
                prop_assert!(how < MergeSlashes || !normal.contains("//"), "{}", normal);
                prop_assert!(how < DecodeAndMergeSlashes || !normal.contains("%2F"), "{}", normal);
            }
        }
    }
}
