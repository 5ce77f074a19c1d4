/** What a batch's file looks like, for a model that is there. */
export const exampleOf = (model: string): string =>
  ['Say hello in French.', 'Name three rivers.']
    .map((content, i) =>
      JSON.stringify({
        custom_id: `row-${i + 1}`,
        method: 'POST',
        url: '/v1/chat/completions',
        body: { model, messages: [{ role: 'user', content }] },
      }),
    )
    .join('\n');
