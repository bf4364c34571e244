{
  description = "A small proxy to your own Claude or ChatGPT subscription, for all your own devices";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-26.05";

  outputs =
    { self, nixpkgs }:
    let
      inherit (nixpkgs) lib;

      systems = [
        "x86_64-linux"
        "aarch64-linux"
        "aarch64-darwin"
      ];
      forAllSystems = f: lib.genAttrs systems (system: f system nixpkgs.legacyPackages.${system});
      onLinux = system: lib.optionalAttrs (lib.hasSuffix "-linux" system);

      cargo = (lib.importTOML ./Cargo.toml).package;
      package =
        {
          lib,
          rustPlatform,
          stdenv,
        }:
        rustPlatform.buildRustPackage {
          pname = "ai-mux";
          inherit (cargo) version;
          src = lib.fileset.toSource {
            root = ./.;
            fileset = lib.fileset.unions [
              ./Cargo.toml
              ./Cargo.lock
              ./.cargo
              ./src
              (lib.fileset.fileFilter (file: file.hasExt "rs" || file.hasExt "pem") ./tests)
            ];
          };
          cargoLock.lockFile = ./Cargo.lock;
          doCheck = stdenv.hostPlatform.isLinux; # the tests read /proc
          checkType = "debug"; # in release each of the tests would be linked with all optimisations
          meta = {
            inherit (cargo) description;
            license = lib.licenses.mit;
            mainProgram = "ai-mux";
            platforms = lib.platforms.unix;
          };
        };
    in
    {
      packages = forAllSystems (
        system: pkgs:
        {
          default = pkgs.callPackage package { };
        }
        // onLinux system {
          static = pkgs.pkgsStatic.callPackage package { };
        }
      );

      apps = forAllSystems (
        system: _: {
          default = {
            type = "app";
            program = lib.getExe self.packages.${system}.default;
            meta = { inherit (cargo) description; };
          };
        }
      );

      overlays.default = final: _: { ai-mux = final.callPackage package { }; };

      nixosModules.default =
        { lib, pkgs, ... }:
        {
          key = "${toString ./.}#nixosModules.default"; # imported twice, it counts once
          imports = [ ./module.nix ];
          services.ai-mux.package = lib.mkDefault self.packages.${pkgs.stdenv.hostPlatform.system}.default;
        };

      devShells = forAllSystems (
        system: pkgs: {
          default = pkgs.mkShell {
            inputsFrom = [ self.packages.${system}.default ];
            packages = [
              pkgs.clippy
              pkgs.deadnix
              pkgs.rust-analyzer
              pkgs.rustfmt
            ];
          };
        }
      );

      formatter = forAllSystems (_: pkgs: pkgs.nixfmt-tree);

      checks = forAllSystems (
        system: pkgs:
        {
          package = self.packages.${system}.default;
        }
        // onLinux system {
          inherit (self.packages.${system}) static;
          nixos = pkgs.testers.runNixOSTest {
            imports = [ ./tests/nixos.nix ];
            defaults.imports = [ self.nixosModules.default ];
          };
        }
      );
    };
}
