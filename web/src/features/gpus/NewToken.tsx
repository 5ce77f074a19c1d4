import { Ends } from '@/components/Ends';
import { ErrorNote } from '@/components/ErrorNote';
import { Secret } from '@/components/Secret';
import { Button, Radio, Stack, TextInput } from '@mantine/core';
import { useMutation, useQueryClient } from '@tanstack/react-query';
import { useState } from 'react';
import { useTranslation } from 'react-i18next';
import { createToken, tokensQuery } from './queries';

export function NewToken({ onDone }: { onDone: () => void }) {
  const { t } = useTranslation();
  const queryClient = useQueryClient();
  const [name, setName] = useState('');
  const [reusable, setReusable] = useState(false);
  const [ends, setEnds] = useState<number | null>(86_400);
  const making = useMutation({
    mutationFn: createToken,
    onSuccess: () => queryClient.invalidateQueries({ queryKey: tokensQuery.queryKey }),
  });
  if (making.data) {
    return (
      <Secret
        title={t('tokens.createdTitle')}
        text={t('tokens.createdText')}
        secret={making.data.token}
        label={t('tokens.title')}
        done={t('tokens.done')}
        onDone={onDone}
      />
    );
  }
  return (
    <form
      onSubmit={(event) => {
        event.preventDefault();
        making.mutate({
          reusable,
          ...(name.trim() ? { name: name.trim() } : {}),
          ...(ends === null ? {} : { expires_in_s: ends }),
        });
      }}
    >
      <Stack>
        <TextInput
          label={t('tokens.name')}
          placeholder={t('tokens.namePlaceholder')}
          value={name}
          onChange={(event) => setName(event.currentTarget.value)}
          maxLength={100}
          data-autofocus
        />
        <Radio.Group
          label={t('tokens.kind')}
          value={reusable ? 'often' : 'once'}
          onChange={(kind) => setReusable(kind === 'often')}
        >
          <Stack gap={8} mt={6}>
            <Radio value="once" label={t('tokens.once')} description={t('tokens.onceText')} />
            <Radio value="often" label={t('tokens.often')} description={t('tokens.oftenText')} />
          </Stack>
        </Radio.Group>
        <Ends label={t('tokens.ends')} value={ends} onChange={setEnds} />
        {making.error ? <ErrorNote error={making.error} /> : null}
        <Button type="submit" loading={making.isPending}>
          {t('tokens.create')}
        </Button>
      </Stack>
    </form>
  );
}
