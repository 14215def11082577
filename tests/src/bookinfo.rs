//! Bookinfo in a lab: the sample's own manifests, its services as processes in pods of two nodes.
//!
//! Promises: Services and service accounts are those of `deploy/samples/bookinfo/bookinfo.yaml`, with the addresses a
//! cluster would have given them; routes are applied from the sample's files as they are. On node `a`: productpage,
//! reviews v1 and the client; on node `b`: details, ratings, reviews v2 and v3. Tested in `tests/bookinfo.rs`.

use std::{fs, net::SocketAddr, path::PathBuf, process::Command};

use anyhow::{Context as _, Result, ensure};

use crate::{Lab, Pod, Service, binary, eventually, net::Addresses};

/// The port of all services.
pub const PORT: u16 = 9080;
/// The header by which productpage says which version of reviews answered.
pub const REVIEWS_HEADER: &str = "x-bookinfo-reviews";
/// The header by which productpage says what color the stars have: `black`, `red`, `none` or `error`.
pub const STARS_HEADER: &str = "x-bookinfo-stars";
/// The header by which every service names its pod.
pub const POD_HEADER: &str = "x-bookinfo-pod";

/// Bookinfo, running.
#[derive(Debug)]
pub struct Bookinfo {
    /// A pod on node `a`, with the identity `client`.
    pub client: Pod,
    /// Its pods by name, such as `reviews-v2`.
    pub pods: Vec<Pod>,
    /// The Service details.
    pub details: Service,
    /// The Service ratings.
    pub ratings: Service,
    /// The Service reviews.
    pub reviews: Service,
    /// The Service productpage.
    pub productpage: Service,
}

/// A pod of the sample: node, service, version.
const PODS: [(&str, &str, &str); 6] = [
    ("b", "details", "v1"),
    ("b", "ratings", "v1"),
    ("a", "productpage", "v1"),
    ("a", "reviews", "v1"),
    ("b", "reviews", "v2"),
    ("b", "reviews", "v3"),
];

impl Bookinfo {
    /// Brings everything up, agents excepted: those are started by whoever wants them, before or after.
    pub async fn start(lab: &Lab) -> Result<Self> {
        let service = |name: &str| Service {
            name: name.to_owned(),
            namespace: "default".to_owned(),
            addresses: Addresses::of_service(lab.world.next_service()),
        };
        let client = lab.node("a").await?.pod("client").sa("client").start().await?;
        let mut bookinfo = Self {
            client,
            pods: Vec::new(),
            details: service("details"),
            ratings: service("ratings"),
            reviews: service("reviews"),
            productpage: service("productpage"),
        };
        lab.apply("bookinfo.yaml", &bookinfo.manifests()?)?;
        for (node, service, version) in PODS {
            let pod = format!("{service}-{version}");
            bookinfo.add(lab, node, &pod, service, version, &[]).await?;
        }
        apply(lab, "destination-rules.yaml", "destination-rules.yaml")?;
        Ok(bookinfo)
    }

    /// Starts one more pod of a service, for example ratings with `--broken=503`.
    pub async fn add(
        &mut self,
        lab: &Lab,
        node: &str,
        pod: &str,
        service: &str,
        version: &str,
        args: &[&str],
    ) -> Result<Pod> {
        let node = lab.node(node).await?;
        let pod = node.pod(pod).sa(&format!("bookinfo-{service}"));
        let pod = pod.labels([("app", service), ("version", version)]).start().await?;
        let mut command = Command::new(binary("bookinfo", "BOOKINFO_BIN", "bookinfo")?);
        command.arg(service).args(["--name", pod.name()]).args(args);
        if service == "reviews" {
            command.args(["--version", version]);
        }
        for upstream in [&self.details, &self.ratings, &self.reviews] {
            let variable = format!("BOOKINFO_{}", upstream.name.to_uppercase());
            command.env(variable, upstream.url(PORT, ""));
        }
        let process = pod.spawn(command)?;
        eventually("a service of Bookinfo that listens", async || {
            ensure!(process.stdout().contains("listening"), "{} does not listen yet", process.label());
            Ok(())
        })
        .await
        .with_context(|| process.tail())?;
        self.pods.push(pod.clone());
        Ok(pod)
    }

    /// The pod with this name.
    pub fn pod(&self, name: &str) -> Result<&Pod> {
        self.pods.iter().find(|pod| pod.name() == name).with_context(|| format!("Bookinfo has no pod {name}"))
    }

    /// What to ask for to see the page, over IPv4.
    pub fn page(&self) -> String {
        self.productpage.url(PORT, "/productpage")
    }

    /// The same page at productpage's own pod, which needs no mesh to be reached.
    pub fn page_of_pod(&self) -> Result<String> {
        let to: SocketAddr = self.pod("productpage-v1")?.at(PORT);
        Ok(format!("http://{to}/productpage"))
    }

    /// The sample's Services, each with its addresses, and service accounts. Its Deployments are the lab's pods.
    fn manifests(&self) -> Result<String> {
        let yaml = read("bookinfo.yaml")?;
        let mut documents = Vec::new();
        for document in yaml.split("\n---\n") {
            let is = |kind: &str| document.lines().any(|line| line == format!("kind: {kind}"));
            if is("Service") {
                documents.push(self.with_addresses(document)?);
            } else if is("ServiceAccount") {
                documents.push(document.to_owned());
            }
        }
        Ok(documents.join("\n---\n"))
    }

    fn with_addresses(&self, document: &str) -> Result<String> {
        let services = [&self.details, &self.ratings, &self.reviews, &self.productpage];
        let named = |service: &&Service| document.contains(&format!("\n  name: {}\n", service.name));
        let service =
            services.into_iter().find(named).context("a Service of Bookinfo that the lab does not know")?;
        let Addresses { v4, v6 } = service.addresses;
        let given = format!("\nspec:\n  clusterIP: {v4}\n  clusterIPs: [\"{v4}\", \"{v6}\"]\n");
        ensure!(document.contains("\nspec:\n"), "the Service {} has no spec", service.name);
        Ok(document.replacen("\nspec:\n", &given, 1))
    }
}

/// Applies a file of the sample as it is. `name` is what it is called in the lab: files whose objects replace one
/// another go by one name, for example `reviews.yaml`.
pub fn apply(lab: &Lab, name: &str, file: &str) -> Result<()> {
    lab.apply(name, &read(file)?)
}

fn read(file: &str) -> Result<String> {
    let samples = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/samples/bookinfo");
    let path = PathBuf::from(samples).join(file);
    fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
}
