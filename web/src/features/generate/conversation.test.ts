import { afterEach, beforeEach, expect, it, vi } from 'vitest';

const STORED = 'fine-conversation';
const TURN = { id: '1', question: 'A secret?', answer: 'Yes.', phase: { is: 'done', reason: 'stop' } };
let stored: Map<string, string>;

beforeEach(() => {
  stored = new Map();
  vi.stubGlobal('sessionStorage', {
    getItem: (key: string) => stored.get(key) ?? null,
    setItem: (key: string, value: string) => void stored.set(key, value),
  });
  vi.resetModules(); // the page is loaded anew
});

afterEach(() => void vi.unstubAllGlobals());

const claimedBy = async (user: string): Promise<string | undefined> => {
  (await import('./conversation')).claimConversation(user);
  return stored.get(STORED);
};

it('keeps the conversation of who is still the same', async () => {
  stored.set(STORED, JSON.stringify({ owner: 'ann', turns: [TURN] }));
  expect(await claimedBy('ann')).toContain('A secret?');
});

it("forgets somebody else's at once, and one of nobody knows whom", async () => {
  stored.set(STORED, JSON.stringify({ owner: 'ann', turns: [TURN] }));
  expect(await claimedBy('bob')).toBe(JSON.stringify({ owner: 'bob', turns: [] }));
  vi.resetModules();
  stored.set(STORED, JSON.stringify([TURN]));
  expect(await claimedBy('bob')).toBe(JSON.stringify({ owner: 'bob', turns: [] }));
});
