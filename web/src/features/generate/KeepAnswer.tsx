import { ErrorNote } from '@/components/ErrorNote';
import { filesQuery } from '@/features/files/queries';
import { addRows, createDataset } from '@/features/training/queries';
import { Alert, Button, Group, Select, Stack, Text, Textarea, TextInput } from '@mantine/core';
import { useMutation, useQuery, useQueryClient } from '@tanstack/react-query';
import { useState } from 'react';
import { useTranslation } from 'react-i18next';
import { Link } from 'react-router';
import type { Turn } from './conversation';
import { exampleOf } from './example';

/** An answer as it should have been becomes an example to learn from. */
export function KeepAnswer({ turn, onDone }: { turn: Turn; onDone: () => void }) {
  const { t } = useTranslation();
  const queryClient = useQueryClient();
  const files = useQuery(filesQuery('fine-tune'));
  const sets = files.data?.filter((each) => each.filename.endsWith('.jsonl')) ?? []; // what can be added to
  const [answer, setAnswer] = useState(turn.answer.trim());
  const [chosen, setChosen] = useState<string | null>(null); // null: the newest, until another is chosen
  const [name, setName] = useState('');
  const into = chosen ?? sets[0]?.id ?? '';
  const keeping = useMutation({
    mutationFn: () => {
      const row = exampleOf(turn, answer);
      return into ? addRows(into, [row]) : createDataset(name.trim() || t('data.newNamePlaceholder'), [row]);
    },
    onSuccess: () => queryClient.invalidateQueries({ queryKey: filesQuery('fine-tune').queryKey }),
  });
  if (keeping.data) {
    const { filename, rows, added } = keeping.data;
    return (
      <Stack>
        <Alert color="fern" variant="light" role="status">
          {added === 0 ? t('data.already', { name: filename }) : t('data.kept', { name: filename, count: rows })}
        </Alert>
        <Group justify="flex-end">
          <Button component={Link} to="/training/new" state={{ file: keeping.data.id }} variant="default">
            {t('data.train')}
          </Button>
          <Button onClick={onDone}>{t('app.close')}</Button>
        </Group>
      </Stack>
    );
  }
  return (
    <form
      onSubmit={(event) => {
        event.preventDefault();
        keeping.mutate();
      }}
    >
      <Stack>
        <Text size="sm" c="dimmed">
          {t('data.editText')}
        </Text>
        <Text size="sm" fw={600}>
          {turn.question}
        </Text>
        <Textarea
          label={t('data.answer')}
          value={answer}
          onChange={(event) => setAnswer(event.currentTarget.value)}
          error={answer.trim() ? null : t('data.empty')}
          autosize
          minRows={4}
          maxRows={14}
          data-autofocus
        />
        <Select
          label={t('data.into')}
          value={into}
          onChange={(id) => setChosen(id ?? '')}
          data={[
            ...sets.map((each) => ({ value: each.id, label: each.filename })),
            { value: '', label: t('data.newSet') },
          ]}
          allowDeselect={false}
        />
        {into ? null : (
          <TextInput
            label={t('data.newName')}
            placeholder={t('data.newNamePlaceholder')}
            value={name}
            onChange={(event) => setName(event.currentTarget.value)}
            maxLength={100}
          />
        )}
        {keeping.error ? <ErrorNote error={keeping.error} /> : null}
        <Button type="submit" loading={keeping.isPending} disabled={!answer.trim() || files.isPending}>
          {t('data.keep')}
        </Button>
      </Stack>
    </form>
  );
}
