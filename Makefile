# Two commands matter: `make demo` and `make test`. Both install what is missing, build, and say what they do.

TARGET  := $(or $(CARGO_TARGET_DIR),target)
RELEASE := $(TARGET)/x86_64-unknown-linux-gnu/release
CACHE   := .cache
PREFIX  ?= /usr/local
# Where bulkhead/config.toml goes; the programs look for it in no other place.
SYSCONFDIR ?= /etc
# What goes with the programs.
KERNEL    ?= $(CACHE)/kernel/current/vmlinux
INITRAMFS ?= $(CACHE)/initramfs.cpio

ifneq ($(SYSCONFDIR),/etc)
export BULKHEAD_SYSCONFDIR := $(SYSCONFDIR)
endif

say      = @printf '\033[1m==> %s %s\033[0m\n' "$$(date +%T)" "$(1)"

.PHONY: all demo test test-unit test-system fuzz bench check install clean deps binaries kernel initramfs images

all: binaries kernel initramfs

demo: all images
	$(call say,running a container in its own microVM)
	@tests/demo $(RELEASE)

test: test-unit test-system

test-unit: deps
	$(call say,unit and property tests)
	cargo test --workspace --exclude tests

test-system: all images
	$(call say,whole-system tests)
	cargo test -p tests

# FUZZ_SECONDS=600 for each target, FUZZ_TARGETS='vsock block' for these, FUZZ_SANITIZER=address; fuzz/README.md says more.
fuzz:
	$(call say,fuzzing: each target for $(or $(FUZZ_SECONDS),60) seconds)
	nice cargo run --quiet -p fuzz --bin fuzz -- $(FUZZ_TARGETS)

bench: all images
	$(call say,figures: virtual time beside runc and crun)
	benches/run

check:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS='-D warnings' cargo doc --workspace --no-deps --document-private-items
	tests/check-files
	@if command -v cargo-deny >/dev/null; then cargo deny check; else echo 'cargo-deny is not here: licences and advisories not checked'; fi

deps:
	@tests/deps

binaries: deps
	$(call say,building bulkhead and its monitor and its agent)
	cargo build --release -p bulkhead -p bulkhead-oci -p bulkhead-shim -p vmm -p guest-agent

kernel: deps
	$(call say,guest kernel: built once and then kept in $(CACHE))
	@kernel-config/build >/dev/null

initramfs: binaries
	@cargo run --quiet -p tests --bin mkinitramfs -- $(RELEASE)/guest-agent $(INITRAMFS)

images: deps
	$(call say,images from Debian packages: made once and then kept in $(CACHE))
	@tests/images/build >/dev/null

install: all
	install -D -t $(DESTDIR)$(PREFIX)/bin $(RELEASE)/bulkhead $(RELEASE)/bulkhead-oci $(RELEASE)/bulkhead-vmm \
		$(RELEASE)/containerd-shim-bulkhead-v2
	install -D -m 644 $(KERNEL) $(DESTDIR)$(PREFIX)/share/bulkhead/vmlinux
	install -D -m 644 $(INITRAMFS) $(DESTDIR)$(PREFIX)/share/bulkhead/initramfs.cpio
	@# Read before use: what is installed is what runs. sha256sum -c SHA256SUMS says so, too.
	cd $(DESTDIR)$(PREFIX)/share/bulkhead && sha256sum vmlinux initramfs.cpio ../../bin/bulkhead ../../bin/bulkhead-oci \
		../../bin/bulkhead-vmm ../../bin/containerd-shim-bulkhead-v2 >SHA256SUMS
	@# One that has been edited stays.
	test -e $(DESTDIR)$(SYSCONFDIR)/bulkhead/config.toml || \
		install -D -m 644 runtime/config.toml $(DESTDIR)$(SYSCONFDIR)/bulkhead/config.toml

clean:
	rm -rf $(TARGET) $(CACHE)
