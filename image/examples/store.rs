//! The image store from the command line, for measuring: `store ROOT load FILE | pull REF | resolve NAME | ls`.

use std::path::Path;
use std::time::Instant;

use bulkhead_image::{LoadOptions, Result, Source, Store, progress};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let start = Instant::now();
    match words.as_slice() {
        [root, "load", file] => {
            let source = Source::from_argument(file.as_ref());
            let progress = progress::for_stderr();
            for image in
                Store::open(Path::new(root))?.load(&source, &LoadOptions::default(), progress.as_ref())?
            {
                println!("{} {}", image.id.short(), image.names.join(" "));
            }
        }
        #[cfg(feature = "pull")]
        [root, "pull", reference] => {
            let progress = progress::for_stderr();
            let options = bulkhead_image::PullOptions::default();
            let image = Store::open(Path::new(root))?.pull(reference, &options, progress.as_ref())?;
            println!("{} {}", image.id.short(), image.names.join(" "));
        }
        [root, "resolve", name] => {
            let image = Store::open(Path::new(root))?.resolve(name)?;
            let user = image.resolve_user(&image.config.user)?;
            println!("{} {} layers, uid {}", image.id.short(), image.layers.len(), user.uid);
        }
        [root, "ls"] => {
            for image in Store::open(Path::new(root))?.list()? {
                println!("{} {:>12} {}", image.id.short(), image.size, image.names.join(" "));
            }
        }
        _ => eprintln!("usage: store ROOT load FILE | pull REF | resolve NAME | ls"),
    }
    eprintln!("{:?}", start.elapsed());
    Ok(())
}
