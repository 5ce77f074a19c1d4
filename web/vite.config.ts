import react from '@vitejs/plugin-react';
import { fileURLToPath } from 'node:url';
import { defineConfig } from 'vitest/config';

// The relay serves dist/ and fills in NONCE for every answer; `npm run dev` forwards the API to a relay on this machine.
const relay = process.env['RELAY_URL'] ?? 'http://127.0.0.1:8000';

export default defineConfig(({ command }) => ({
  plugins: [react()],
  resolve: { alias: { '@': fileURLToPath(new URL('./src', import.meta.url)) } },
  ...(command === 'build' ? { html: { cspNonce: '{{nonce}}' } } : {}),
  build: {
    target: 'es2022',
    assetsInlineLimit: 0, // data: URLs are not allowed by the page's policy
    modulePreload: { polyfill: false },
    chunkSizeWarningLimit: 900,
  },
  server: { proxy: { '/api': relay, '/v1': relay } },
  test: { include: ['src/**/*.test.ts'], environment: 'node' },
}));
