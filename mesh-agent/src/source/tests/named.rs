//! Files that rules name: which are read, and that they are followed.

use super::*;
use crate::state::snapshot::{ClientTls, Origination};

/// A service, and a rule for it that names a file for the authorities it believes.
fn believes(path: &str) -> String {
    format!(
        "{}---\n{{apiVersion: networking.istio.io/v1, kind: DestinationRule, metadata: {{name: a}}, \
         spec: {{host: a, trafficPolicy: {{tls: {{mode: SIMPLE, caCertificates: {path:?}}}}}}}}}\n",
        service("a")
    )
}

fn tls(snapshot: &Snapshot) -> Origination {
    snapshot.services[HOST].ports[0].cluster.tls.clone()
}

fn roots(snapshot: &Snapshot) -> Option<Vec<u8>> {
    let Origination::Tls(tls) = tls(snapshot) else { return None };
    let ClientTls { terms, .. } = &*tls;
    terms.roots.as_ref().map(|roots| roots.to_vec())
}

async fn until_roots(source: &mut Source, text: &str) {
    source.snapshots.wait_for(|snapshot| roots(snapshot).as_deref() == Some(text.as_bytes())).await.unwrap();
}

#[tokio::test]
async fn nothing_outside_the_directory_is_read() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("config");
    fs::create_dir_all(dir.join("certs")).unwrap();
    fs::create_dir(dir.join("dir.pem")).unwrap();
    let secret = put(parent.path(), "secret.pem", "secret");
    let inside = put(&dir, "inside.pem", "inside");
    symlink(&secret, dir.join("link.pem")).unwrap();
    symlink("../secret.pem", dir.join("relative.pem")).unwrap();
    symlink("..", dir.join("up")).unwrap();
    symlink("/proc/self/root", dir.join("root")).unwrap();
    symlink("../inside.pem", dir.join("certs/link.pem")).unwrap();
    nix::unistd::mkfifo(&dir.join("pipe.pem"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    fs::write(dir.join("long.pem"), vec![b'a'; 1024 * 1024 + 1]).unwrap();
    let absolute = inside.to_str().unwrap();
    let outside = secret.to_str().unwrap();
    let table = [
        ("inside.pem", Ok("inside")),
        ("./inside.pem", Ok("inside")),
        (absolute, Ok("inside")),
        ("certs/link.pem", Ok("inside")),
        ("certs/../inside.pem", Err("is not inside")),
        ("../secret.pem", Err("is not inside")),
        (outside, Err("is not inside")),
        ("/etc/hosts", Err("is not inside")),
        ("link.pem", Err("leads out of")),
        ("relative.pem", Err("leads out of")),
        ("up/secret.pem", Err("leads out of")),
        ("root/etc/hosts", Err("leads out of")),
        ("none.pem", Err("is not there")),
        ("dir.pem", Err("is not a regular file")),
        ("pipe.pem", Err("is not a regular file")),
        ("long.pem", Err("is larger than")),
    ];
    put(&dir, "a.yaml", &service("a"));
    let mut source = start(&dir).await;
    for (path, expected) in table {
        put(&dir, "a.yaml", &believes(path));
        match expected {
            Ok(content) => {
                until_roots(&mut source, content).await;
                until_no_problem(&mut source).await;
            }
            Err(text) => {
                let problem = until_problem(&mut source, &format!("the file {path:?} {text}")).await;
                assert_eq!(problem.field.as_deref(), Some("spec.trafficPolicy.tls.caCertificates"), "{path}");
                let broken = |snapshot: &Arc<Snapshot>| matches!(tls(snapshot), Origination::Broken(why) if why.contains(text));
                source.snapshots.wait_for(broken).await.unwrap();
            }
        }
        // So that the next one is waited for.
        put(&dir, "a.yaml", &service("a"));
        source.snapshots.wait_for(|snapshot| matches!(tls(snapshot), Origination::Plaintext)).await.unwrap();
    }
}

#[tokio::test]
async fn files_are_followed_wherever_they_are() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("config");
    fs::create_dir(&dir).unwrap();
    put(&dir, "a.yaml", &believes("deep/certs/ca.pem"));
    let mut source = start(&dir).await;
    until_problem(&mut source, "is not there").await;
    // Directories come later than what names them, one in the other.
    fs::create_dir(dir.join("deep")).unwrap();
    fs::create_dir(dir.join("deep/certs")).unwrap();
    put(&dir.join("deep/certs"), "ca.pem", "one");
    until_roots(&mut source, "one").await;
    until_no_problem(&mut source).await;
    put(&dir.join("deep/certs"), "ca.pem", "two");
    until_roots(&mut source, "two").await;
    // Written in place.
    fs::write(dir.join("deep/certs/ca.pem"), "three").unwrap();
    until_roots(&mut source, "three").await;
    // Another directory comes into its place.
    fs::create_dir(dir.join("new")).unwrap();
    fs::write(dir.join("new/ca.pem"), "four").unwrap();
    fs::rename(dir.join("deep/certs"), dir.join("old")).unwrap();
    fs::rename(dir.join("new"), dir.join("deep/certs")).unwrap();
    until_roots(&mut source, "four").await;
    put(&dir.join("deep/certs"), "ca.pem", "five");
    until_roots(&mut source, "five").await;
    fs::remove_file(dir.join("deep/certs/ca.pem")).unwrap();
    until_problem(&mut source, "is not there").await;
    assert_eq!(roots(&source.snapshots.borrow()), None);

    // A file beside the manifests; and one that is a link to where a mounted Secret keeps its data.
    put(&dir, "a.yaml", &believes("ca.pem"));
    put(&dir, "ca.pem", "six");
    until_roots(&mut source, "six").await;
    put(&dir, "ca.pem", "seven");
    until_roots(&mut source, "seven").await;
    for (version, content) in [("..one", "eight"), ("..two", "nine")] {
        fs::create_dir(dir.join(version)).unwrap();
        fs::write(dir.join(version).join("ca.pem"), content).unwrap();
        symlink(version, dir.join("..tmp")).unwrap();
        fs::rename(dir.join("..tmp"), dir.join("..data")).unwrap();
        if version == "..one" {
            symlink("..data/ca.pem", dir.join("link.pem")).unwrap();
            put(&dir, "a.yaml", &believes("link.pem"));
        }
        until_roots(&mut source, content).await;
    }
    // Several files may have an object; what they name stays.
    put(&dir, "b.yaml", &service("a"));
    until_problem(&mut source, "has this object too").await;
    put(&dir, "c.yaml", &service("c"));
    until_hosts(&mut source, &["a", "c"]).await;
    until_roots(&mut source, "nine").await;
    fs::remove_file(dir.join("a.yaml")).unwrap();
    source.snapshots.wait_for(|snapshot| matches!(tls(snapshot), Origination::Plaintext)).await.unwrap();
}

#[test]
fn keys_of_gateways_are_read_for_gateways_alone() {
    let parent = tempfile::tempdir().unwrap();
    put(parent.path(), "key.pem", "key");
    let server = "{port: {number: 443, name: https, protocol: HTTPS}, hosts: ['*'], \
                  tls: {mode: SIMPLE, serverCertificate: none.pem, privateKey: key.pem}}";
    let gateway = format!(
        "{{apiVersion: networking.istio.io/v1, kind: Gateway, metadata: {{name: g}}, spec: {{servers: [{server}]}}}}\n"
    );
    put(parent.path(), "gateway.yaml", &gateway);
    for (serves, expected) in
        [(false, vec!["Gateway"]), (true, vec!["Gateway", "File key.pem", "File none.pem"])]
    {
        let mut directory = Directory::new(parent.path().to_owned()).serving(serves);
        let changes = directory.read(&Look::Everything, &Objects::new());
        let read: BTreeSet<String> = changes
            .iter()
            .map(|change| match change {
                Change::Set(key, _) | Change::Gone(key) => {
                    key.to_string().replace("Gateway default/g", "Gateway")
                }
            })
            .collect();
        assert_eq!(read, expected.into_iter().map(str::to_owned).collect(), "{serves}");
    }
}
