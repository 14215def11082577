//! Fetching key sets from servers that answer well, badly, or from where nothing is fetched; and telling agents.
#![expect(clippy::unwrap_used, reason = "tests")]

mod distribution;
mod server;

use std::{sync::Arc, time::Duration};

use self::server::{Server, keys};
use crate::controller::jwks::{Addresses, Fetcher};
use crate::state::snapshot::Subnet;

const TIMEOUT: Duration = Duration::from_secs(20);

/// One that may fetch from this machine.
fn fetcher() -> Fetcher {
    let addresses = Addresses { allowed: vec![Subnet::parse("127.0.0.0/8").unwrap()], refused: Vec::new() };
    Fetcher::new(addresses, None).unwrap()
}

#[tokio::test]
async fn a_set_is_fetched_and_what_is_none_is_told() {
    let server = Server::start().await;
    server.answer("/keys", 200, &keys("one"));
    server.answer("/failing", 500, "");
    server.answer("/text", 200, "hello");
    server.answer("/empty", 200, "{\"keys\":[]}");
    server.answer("/long", 200, &" ".repeat((1 << 20) + 1));
    for (from, to) in [
        ("/moved", "/keys"),
        ("/far", "http://169.254.169.254/latest"),
        ("/file", "file:///etc/passwd"),
        ("/loop", "/loop"),
        ("/nowhere", ""),
    ] {
        server.redirect(from, to);
    }
    for (path, expected) in [
        ("/keys", ""),
        ("/moved", ""),
        ("/failing", "answered 500"),
        ("/text", "is not a JSON Web Key Set"),
        ("/empty", "it is empty"),
        ("/long", "at most 1048576 bytes"),
        ("/far", "169.254.169.254, from where nothing is fetched: it is a link-local address"),
        ("/file", "redirects to \"file:///etc/passwd\""),
        ("/loop", "more than 3 redirects"),
        ("/nowhere", "redirects to"),
    ] {
        let fetched = fetcher().fetch(&server.url(path), TIMEOUT).await;
        match fetched {
            Ok(set) => assert!(expected.is_empty() && set.len() == 1, "{path}"),
            Err(why) => assert!(!expected.is_empty() && why.contains(expected), "{path}: {why}"),
        }
    }
    let late = fetcher().fetch(&server.url("/never"), Duration::from_millis(50)).await;
    assert!(late.is_err_and(|why| why.contains("was not there within 50ms")));
}

/// Not even a connection is made.
#[tokio::test]
async fn nothing_is_fetched_from_the_controllers_own_machine() {
    let server = Server::start().await;
    server.answer("/keys", 200, &keys("one"));
    let fetcher = Fetcher::new(Addresses::default(), None).unwrap();
    for host in ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0"] {
        let why = fetcher.fetch(&format!("http://{host}:{}/keys", server.port()), TIMEOUT).await.unwrap_err();
        assert!(why.contains("from where nothing is fetched"), "{host}: {why}");
    }
    assert_eq!(server.connections(), 0);
    // And by name what was refused by address is refused too, though its neighbours are allowed.
    let addresses = Addresses {
        allowed: vec![Subnet::parse("10.0.0.0/8").unwrap()],
        refused: vec!["127.0.0.1".parse().unwrap()],
    };
    let fetcher = Fetcher::new(addresses, None).unwrap();
    let why = fetcher.fetch(&server.url("/keys"), TIMEOUT).await.unwrap_err();
    assert!(why.contains("it is the API server's"), "{why}");
    assert_eq!(server.connections(), 0);
}

#[tokio::test]
async fn https_is_believed_by_its_roots() {
    let (server, root) = Server::start_tls().await;
    server.answer("/keys", 200, &keys("one"));
    server.redirect("/plain", &server.url("/keys").replace("https", "http"));
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("roots.pem");
    std::fs::write(&file, root).unwrap();
    let allowed = vec![Subnet::parse("127.0.0.0/8").unwrap()];
    let addresses = || Addresses { allowed: allowed.clone(), refused: Vec::new() };
    let fetcher = Fetcher::new(addresses(), Some(&file)).unwrap();
    let fetched = fetcher.fetch(&server.url("/keys"), TIMEOUT).await;
    assert!(fetched.is_ok(), "{fetched:?}");
    let plain = fetcher.fetch(&server.url("/plain"), TIMEOUT).await;
    assert!(plain.as_ref().is_err_and(|why| why.contains("which is not https")), "{plain:?}");
    let other = self::fetcher().fetch(&server.url("/keys"), TIMEOUT).await;
    assert!(other.as_ref().is_err_and(|why| why.contains("the TLS handshake with localhost")), "{other:?}");

    for (text, expected) in [("", "holds no certificate"), ("rubbish", "holds no certificate")] {
        std::fs::write(&file, text).unwrap();
        let bad = Fetcher::new(addresses(), Some(&file)).map(|_| ()).unwrap_err().to_string();
        assert!(bad.contains(expected) && bad.contains("roots.pem"), "{bad}");
    }
    let missing = Fetcher::new(addresses(), Some(&dir.path().join("none.pem"))).map(|_| ()).unwrap_err();
    assert!(missing.to_string().contains("none.pem"), "{missing}");
}

fn same(one: Option<&Arc<crate::state::snapshot::KeySet>>, text: &str) -> bool {
    one.is_some_and(|keys| keys.text() == text)
}
