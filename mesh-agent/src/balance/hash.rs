//! What a request is told apart by, for clusters that hash.
//!
//! Promises the same hash for the same request on every node. Tested below.

use std::{fmt::Write as _, net::IpAddr, time::Duration};

use http::{HeaderMap, HeaderValue, Uri, header::COOKIE};

use crate::{
    route,
    state::snapshot::{Cluster, HashCookie, HashKey, hash_of},
};

/// A request's hash.
#[derive(Debug, Default)]
pub struct Keyed {
    /// `None` where the request has nothing to be told apart by: then any endpoint will do.
    pub hash: Option<u64>,
    /// A cookie that the client is to be given with the response, so that it has one from now on.
    pub set_cookie: Option<HeaderValue>,
}

/// The hash of a request (`None`: of opaque bytes, which only have a source) to this cluster.
pub fn key(cluster: &Cluster, request: Option<(&Uri, &HeaderMap)>, source: IpAddr) -> Keyed {
    let Some(table) = &cluster.hash else { return Keyed::default() };
    let hash = match (&*table.key, request) {
        (HashKey::SourceIp, _) => Some(hash_of_address(source)),
        (_, None) => None,
        (HashKey::Header(name), Some((_, headers))) => hash_of_values(headers, name),
        (HashKey::Query(name), Some((uri, _))) => {
            route::query_parameter(uri, name).map(|value| hash_of(value.as_bytes()))
        }
        (HashKey::Cookie(cookie), Some((_, headers))) => return by_cookie(cookie, headers),
    };
    Keyed { hash, set_cookie: None }
}

fn hash_of_address(address: IpAddr) -> u64 {
    match address {
        IpAddr::V4(ip) => hash_of(&ip.octets()),
        IpAddr::V6(ip) => hash_of(&ip.octets()),
    }
}

fn hash_of_values(headers: &HeaderMap, name: &http::HeaderName) -> Option<u64> {
    let mut values = headers.get_all(name).iter();
    let first = hash_of(values.next()?.as_bytes());
    Some(values.fold(first, |hash, value| hash.rotate_left(1) ^ hash_of(value.as_bytes())))
}

fn by_cookie(cookie: &HashCookie, headers: &HeaderMap) -> Keyed {
    if let Some(value) = value_of(headers, &cookie.name) {
        return Keyed { hash: Some(hash_of(value)), set_cookie: None };
    }
    let Some(ttl) = cookie.ttl else { return Keyed::default() };
    let value = format!("{:016x}", fastrand::u64(..));
    let set_cookie = HeaderValue::from_str(&written(cookie, &value, ttl)).ok();
    Keyed { hash: Some(hash_of(value.as_bytes())), set_cookie }
}

/// The first cookie of this name (RFC 6265 section 5.4), without quotes around its value.
fn value_of<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a [u8]> {
    let all = headers.get_all(COOKIE).into_iter();
    let mut pairs = all.flat_map(|value| value.as_bytes().split(|byte| *byte == b';'));
    pairs.find_map(|pair| {
        let value = pair.trim_ascii().strip_prefix(name.as_bytes())?.strip_prefix(b"=")?;
        Some(value.strip_prefix(b"\"").and_then(|value| value.strip_suffix(b"\"")).unwrap_or(value))
    })
}

/// Not for scripts, as Envoy's: nobody but the mesh has to read it.
fn written(cookie: &HashCookie, value: &str, ttl: Duration) -> String {
    let mut text = format!("{}={value}", cookie.name);
    // Writing to a string cannot fail.
    if !ttl.is_zero() {
        let _ = write!(text, "; Max-Age={}", ttl.as_secs());
    }
    if let Some(path) = &cookie.path {
        let _ = write!(text, "; Path={path}");
    }
    for attribute in &*cookie.attributes {
        let _ = write!(text, "; {attribute}");
    }
    text.push_str("; HttpOnly");
    text
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        balance::tests::cluster,
        state::snapshot::{Balancing, ConsistentHash, HashTable},
    };

    const SOURCE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 9));

    fn by(key: HashKey) -> Cluster {
        let all = cluster(Balancing::Random, 3);
        let addresses: Vec<_> = all.endpoints.iter().map(|endpoint| endpoint.address).collect();
        Cluster { hash: Some(ConsistentHash::new(Arc::new(key), HashTable::Ring(64), &addresses)), ..all }
    }

    fn cookie(ttl: Option<u64>) -> HashCookie {
        HashCookie {
            name: "user".into(),
            path: Some("/a".into()),
            ttl: ttl.map(Duration::from_secs),
            attributes: Arc::new(["SameSite=Lax".to_owned(), "Secure".to_owned()]),
        }
    }

    fn of(cluster: &Cluster, uri: &str, headers: &[(&'static str, &'static str)]) -> Option<u64> {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(*name, HeaderValue::from_static(value));
        }
        key(cluster, Some((&uri.parse().unwrap(), &map)), SOURCE).hash
    }

    #[test]
    fn each_key_reads_its_own() {
        let header = by(HashKey::Header(http::HeaderName::from_static("x-user")));
        let alice = of(&header, "/", &[("x-user", "alice")]);
        assert!(alice.is_some() && alice == of(&header, "/other", &[("x-user", "alice"), ("x-b", "c")]));
        assert_ne!(alice, of(&header, "/", &[("x-user", "bob")]));
        assert_ne!(alice, of(&header, "/", &[("x-user", "alice"), ("x-user", "bob")]));
        assert_eq!(of(&header, "/", &[]), None);

        let query = by(HashKey::Query("id".into()));
        let seven = of(&query, "/a?id=7", &[]);
        assert!(seven.is_some() && seven == of(&query, "/b?x=y&id=7&id=8", &[]));
        assert_ne!(seven, of(&query, "/a?id=8", &[]));
        assert_eq!(of(&query, "/a?ids=7", &[]), None);

        let source = by(HashKey::SourceIp);
        assert_eq!(of(&source, "/", &[]), key(&source, None, SOURCE).hash);
        assert_ne!(of(&source, "/", &[]), key(&source, None, "fd00::9".parse().unwrap()).hash);

        let cookies = by(HashKey::Cookie(cookie(None)));
        let alice = of(&cookies, "/", &[("cookie", "a=b; user=alice")]);
        assert!(alice.is_some());
        assert_eq!(alice, of(&cookies, "/", &[("cookie", "a=b"), ("cookie", "user=\"alice\";c=d")]));
        assert_ne!(alice, of(&cookies, "/", &[("cookie", "user=bob")]));
        assert_eq!(of(&cookies, "/", &[("cookie", "users=alice")]), None);
        assert_eq!(key(&cookies, None, SOURCE).hash, None, "opaque bytes have no cookies");
    }

    #[test]
    fn who_has_no_cookie_is_given_one_that_leads_to_the_same_endpoint() {
        for (ttl, age) in [(3600, "; Max-Age=3600"), (0, "")] {
            let cluster = by(HashKey::Cookie(cookie(Some(ttl))));
            let given = key(&cluster, Some((&Uri::from_static("/"), &HeaderMap::new())), SOURCE);
            let set = given.set_cookie.unwrap();
            let set = set.to_str().unwrap();
            let (pair, rest) = set.split_once(';').unwrap();
            assert_eq!(format!(";{rest}"), format!("{age}; Path=/a; SameSite=Lax; Secure; HttpOnly"));
            let mut headers = HeaderMap::new();
            headers.insert(COOKIE, HeaderValue::from_str(pair).unwrap());
            let again = key(&cluster, Some((&Uri::from_static("/"), &headers)), SOURCE);
            assert_eq!((again.hash, again.set_cookie), (given.hash, None));
        }
        let none = by(HashKey::Cookie(cookie(None)));
        let given = key(&none, Some((&Uri::from_static("/"), &HeaderMap::new())), SOURCE);
        assert_eq!((given.hash, given.set_cookie), (None, None));
    }

    #[test]
    fn clusters_that_do_not_hash_read_nothing() {
        assert_eq!(key(&cluster(Balancing::Random, 3), None, SOURCE).hash, None);
    }
}
