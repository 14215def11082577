//! The requests in bytes that have passed, read by the shortest rules there are: they cannot be wrong about bytes that
//! can be read in one way only.

/// One request, as far as it goes.
#[derive(Debug, PartialEq, Eq)]
pub struct Message {
    pub method: String,
    pub target: String,
    /// The decoded body; none when it breaks off.
    pub body: Option<Vec<u8>>,
}

/// All of them. Panics where a head is none or breaks off: such a head must not have passed.
pub fn messages(mut bytes: &[u8]) -> Vec<Message> {
    let mut messages = Vec::new();
    while !bytes.is_empty() {
        let mut headers = [httparse::EMPTY_HEADER; 128];
        let mut request = httparse::Request::new(&mut headers);
        let length = match request.parse(bytes) {
            Ok(httparse::Status::Complete(length)) => length,
            other => panic!("a head that is none has passed: {other:?}"),
        };
        let value = |name: &str| {
            let mut found = request.headers.iter().filter(|header| header.name.eq_ignore_ascii_case(name));
            let value = found.next().map(|header| header.value);
            assert!(found.next().is_none(), "{name} twice");
            value
        };
        let (method, target) = (request.method.unwrap_or_default(), request.path.unwrap_or_default());
        let rest = &bytes[length..];
        let (body, after) = match (value("transfer-encoding"), value("content-length")) {
            (None, None) => (Some(Vec::new()), rest),
            (None, Some(length)) => counted(rest, length),
            (Some(_), None) => chunks(rest).map_or((None, &[][..]), |(body, after)| (Some(body), after)),
            (Some(_), Some(_)) => panic!("Transfer-Encoding together with Content-Length has passed"),
        };
        // The service of `by_hyper` closes after these.
        let last = request.version == Some(0)
            || request.headers.iter().any(|header| header.name.eq_ignore_ascii_case("connection"));
        let Ok(target) = target.parse::<http::Uri>() else { panic!("a target that is none has passed") };
        messages.push(Message { method: method.to_owned(), target: target.to_string(), body });
        bytes = after;
        if last {
            break;
        }
    }
    messages
}

fn counted<'a>(rest: &'a [u8], length: &[u8]) -> (Option<Vec<u8>>, &'a [u8]) {
    let Ok(length) = String::from_utf8_lossy(length).parse::<u64>() else { panic!("no length has passed") };
    match usize::try_from(length).ok().and_then(|length| rest.split_at_checked(length)) {
        Some((body, after)) => (Some(body.to_vec()), after),
        None => (None, &[]),
    }
}

/// A body in chunks and what is after it; none when it breaks off.
fn chunks(mut rest: &[u8]) -> Option<(Vec<u8>, &[u8])> {
    let mut body = Vec::new();
    loop {
        let (line, after) = line(rest)?;
        let digits = line.split(|byte| *byte == b';').next().unwrap_or_default();
        let size = u64::from_str_radix(str::from_utf8(digits).ok()?, 16).ok()?;
        if size == 0 {
            rest = after;
            break;
        }
        let (data, after) = after.split_at_checked(usize::try_from(size).ok()?)?;
        body.extend_from_slice(data);
        rest = after.strip_prefix(b"\r\n")?;
    }
    loop {
        let (line, after) = line(rest)?;
        rest = after;
        if line.is_empty() {
            return Some((body, rest));
        }
    }
}

fn line(rest: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = rest.windows(2).position(|pair| pair == b"\r\n")?;
    Some((&rest[..end], &rest[end + 2..]))
}
