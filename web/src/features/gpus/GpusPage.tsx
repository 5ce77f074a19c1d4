export function GpusPage() {
  return null;
}
